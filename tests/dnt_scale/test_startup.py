"""Nothing in the working folder is taken for a part of ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dnt_scale import startup
from testbed.run import python

pytestmark = pytest.mark.slow

HERE = Path(startup.__file__).parent.parent


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(startup, "_ours", False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
        monkeypatch.setenv(name, "")  # to be put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("pythonpath", "kept", "after"),
    [
        (None, False, None),
        (":/a", False, "/a"),
        ("/a::/b", False, "/a:/b"),
        (":", False, None),
        (".", True, "."),
        ("{here}:/a", True, "{here}:/a"),
    ],
)
def test_the_folder_leaves_the_path_unless_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    pythonpath: str | None,
    kept: bool,
    after: str | None,
) -> None:
    if pythonpath is not None:
        monkeypatch.setenv("PYTHONPATH", pythonpath.format(here=tmp_path))
    sys.path[:0] = [str(tmp_path), "/a"]
    startup.leave_folder_out()
    assert (str(tmp_path) in sys.path) is kept and "/a" in sys.path
    assert os.environ.get("PYTHONPATH") == (after and after.format(here=tmp_path))
    assert os.environ["PYTHONSAFEPATH"] == "1"
    startup.forget()
    assert "PYTHONSAFEPATH" not in os.environ


def test_a_checkout_stays_on_the_path_also_for_what_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(HERE)
    sys.path.insert(0, str(HERE))
    startup.leave_folder_out()
    assert sys.path[0] == str(HERE) and os.environ["PYTHONPATH"] == str(HERE)


def test_what_a_user_asked_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "yes")
    startup.leave_folder_out()
    startup.forget()
    assert os.environ["PYTHONSAFEPATH"] == "yes"


def test_what_lies_there_is_not_imported(tmp_path: Path) -> None:
    """Not by workers, whose server Python starts with the working folder on its path, and not by
    `python -m`.
    """
    stop = "raise SystemExit('imported from the working folder')\n"
    for name in (
        "hydra",
        "omegaconf",
        "torch/__init__",
        "mlflow",
        "configs/__init__",
        "data_prep/__init__",
        "tests",
    ):
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(stop)
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    done = python("-m", "dnt_scale.train", "run.name=x", "data.path=nowhere", "run.device=cpu")
    assert done.code == 2 and done.err.startswith("error: ") and "nowhere" in done.err, done.err
    for name in ("queue", "types", "random", "socket", "numpy"):
        (tmp_path / f"{name}.py").write_text(stop)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(
            "a line of text that is told again, and again\n" * 400
        )
    command = [
        str(Path(sys.executable).with_name("dnt")),
        "data",
        "prepare",
        *map("{}.txt".format, range(3)),
    ]
    sizes = [
        "--out",
        "made",
        "--vocab-size",
        "280",
        "--seq-len",
        "16",
        "--val-fraction",
        "0",
        "--workers",
        "2",
    ]
    prepared = subprocess.run([*command, *sizes], capture_output=True, text=True)
    assert prepared.returncode == 0, prepared.stderr
    assert (tmp_path / "made" / "manifest.json").exists()


@pytest.mark.parametrize("said", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_threads_sleep_soon_unless_a_user_says_otherwise(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in others}
    monkeypatch.setattr(os, "environ", environment)
    startup.let_threads_sleep()
    assert {name: environment.get(name) for name in others} == {
        "OMP_WAIT_POLICY": None,
        "GOMP_SPINCOUNT": "1000",
    }
    del environment["GOMP_SPINCOUNT"]
    environment[said] = "ours"
    startup.let_threads_sleep()
    assert {name: environment[name] for name in others & environment.keys()} == {said: "ours"}


def test_it_is_said_before_torch_is_there() -> None:
    told = "print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    start = "import os, sys; sys.argv = ['-m']; import dnt_scale"
    others = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {name: value for name, value in os.environ.items() if name not in others}
    done = subprocess.run(
        [sys.executable, "-c", f"{start}; {told}"],
        env=env,
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["1000", "False"], done.stderr


BLOCKS = """
import resource
from dnt_scale.startup import keep_memory
keep_memory()
for turn in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"x") * (64 << 20)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(not hasattr(startup._libc, "mallopt"), reason="malloc is not glibc's")
@pytest.mark.parametrize(("malloc", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "8"}, False)])
def test_memory_that_was_freed_is_there_for_the_next(malloc: dict[str, str], kept: bool) -> None:
    env = {name: value for name, value in os.environ.items() if "MALLOC" not in name} | malloc
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS], env=env, cwd=HERE, capture_output=True, text=True
    )
    assert (int(done.stdout) < 1000) is kept, done.stdout + done.stderr
