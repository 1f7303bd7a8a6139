"""Files that are whole or not there, locks between processes, room on disks."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.files import file_lock, free_bytes, nearest_existing, sha256_of, sync, write_whole

HOLDER = """
import sys
from pathlib import Path
from data_prep.files import file_lock
with file_lock(Path(sys.argv[1]), shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("held", "asked", "is_free"),
    [(False, False, False), (False, True, False), (True, False, False), (True, True, True)],
)
def test_a_lock_is_held_alone_or_shared(
    tmp_path: Path, held: bool, asked: bool, is_free: bool
) -> None:
    place = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(place), "shared" if held else "alone"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin and holder.stdout and holder.stdout.readline() == "held\n"
        if is_free:
            with file_lock(place, shared=asked):
                pass
        else:
            with pytest.raises(BlockingIOError), file_lock(place, shared=asked):
                pass
        holder.kill()
    with file_lock(place, wait=True):  # who was killed holds nothing
        pass


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "set.json"
    write_whole(file, lambda beside: beside.write_text("whole"))

    def half(beside: Path) -> None:
        beside.write_text("ha")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_whole(file, half)
    assert (file.read_text(), list(tmp_path.iterdir())) == ("whole", [file])
    assert sha256_of(file) == hashlib.sha256(b"whole").hexdigest()
    sync(file)
    sync(tmp_path)


def test_room_is_that_of_the_folder_above_what_is_not_there(tmp_path: Path) -> None:
    below = tmp_path / "runs" / "new" / "checkpoints"
    assert nearest_existing(below) == tmp_path
    assert nearest_existing(tmp_path) == tmp_path
    assert nearest_existing(Path("no/such/folder")) == Path.cwd()
    total = shutil.disk_usage(tmp_path).total
    assert 0 <= free_bytes(below) <= total
