"""Real event files, as `tensorboard --logdir RUN/tensorboard` reads them."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dnt_scale import config
from dnt_scale.record.backend import check_backends
from dnt_scale.record.files import read_json
from dnt_scale.record.finalize import finalize_run
from dnt_scale.record.plots import plot_run
from dnt_scale.record.sender import send_all
from dnt_scale.record.sender_files import Sent, unsent_lines
from dnt_scale.record.tensorboard import TensorBoard
from dnt_scale.record.tracker import Tracker
from dnt_scale.record.training_process import EndedTraining
from dnt_scale.train.recorded import Typed
from dnt_scale.train.run_start import Begun, begin, make_room
from testbed.run import PLOTS, tiny, train
from testbed.stores import PATIENCE_S, points, sqlite_store
from testbed.waiting import until
from tests.helpers.senders import begin as begin_sending
from tests.helpers.senders import start, without_processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(TensorBoard.objection()), reason=f"tensorboard {TensorBoard.objection()}"
    ),
]

HERE = {"backends": ["tensorboard"]}


def shown(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar that TensorBoard shows, by its name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
        if not tag.startswith("goodput/")
    }


def others(run_dir: Path) -> dict[str, list[bytes]]:
    """The texts and pictures that TensorBoard shows, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(
        str(run_dir / "tensorboard"), size_guidance={"images": 0, "tensors": 0}
    )
    found.Reload()
    texts = {
        tag.removesuffix("/text_summary"): [
            event.tensor_proto.string_val[0] for event in found.Tensors(tag)
        ]
        for tag in found.Tags()["tensors"]
    }
    pictures = {
        tag: [event.encoded_image_string for event in found.Images(tag)]
        for tag in found.Tags()["images"]
    }
    return texts | pictures


def losses(steps: int) -> list[tuple[int, float]]:
    """What `shown` gives of ``train/loss`` after ``steps`` steps of `begin_sending`."""
    return [(step, pytest.approx(1 / step)) for step in range(1, steps + 1)]


def test_a_run_and_its_resumption_show_each_step_once(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "tiny"
    overrides = tiny(
        corpus,
        run_dir,
        "tracking=tensorboard",
        "tracking.enabled=true",
        "checkpoint.every=4",
        "eval.every=5",
    )
    train([*overrides, "train.steps=9"], env=PLOTS).ok()
    once = others(run_dir)
    assert [step for step, _ in shown(run_dir)["train/loss"]] == list(range(1, 10))
    train([*overrides, "train.steps=14"], ranks=2, env=PLOTS).ok()
    found, also = shown(run_dir), others(run_dir)
    assert [step for step, _ in found["train/loss"]] == list(range(1, 15))
    assert [step for step, _ in found["val/loss"]] == [0, 5, 9, 10, 14]
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 15 and unsent_lines(run_dir) == 0
    # train.steps is another
    assert b"| optim.lr |" in also["params"][0] and len(also["params"]) == 2
    assert b"To go on with it" in also["run"][0] and b"git_commit" in also["tags"][0]
    assert once["plots/loss"] == also["plots/loss"][:1]
    assert also["plots/loss"][-1] == (run_dir / "plots" / "loss.png").read_bytes()
    assert (
        not (run_dir / "logs" / "mlflow.json").exists()
        and not (run_dir.parent / "mlflow.db").exists()
    )


def test_mlflow_and_tensorboard_get_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = sqlite_store(tmp_path / "runs" / "mlflow.db")
    names = {
        "uri": uri,
        "experiment": "tests",
        "run_name": "one",
        "run_id": "x",
        "params": {},
        "tags": {},
    }
    run_dir = tmp_path / "runs" / "one"
    both = ["mlflow", "tensorboard"]
    tracker = Tracker.start(run_dir, backends=both, enabled=True, resume_step=0, **names)  # type: ignore[arg-type]
    for step in range(1, 31):
        tracker.log({"step": step, "time": 1e9 + step, "train/loss": 1 / step})
    tracker.finish("FINISHED", PATIENCE_S)
    assert capfd.readouterr().err == ""
    assert [step for step, _ in points(uri, "one", "train/loss")] == list(range(1, 31))
    assert shown(run_dir)["train/loss"] == losses(30)


TRACKED = """
import signal, sys
from pathlib import Path
from dnt_scale.record.tracker import Tracker
tracker = Tracker.start(Path(sys.argv[1]), backends=["tensorboard"], uri=None, experiment="e",
                        run_name="victim", run_id="v", params={}, tags={}, enabled=True,
                        resume_step=0)
for step in range(1, 51):
    tracker.log({"step": step, "tokens": step, "train/loss": 1 / step})
print(tracker.senders[0].process.pid, flush=True)
signal.pause()
"""


@pytest.mark.parametrize("sender_too", [False, True])
def test_a_killed_run_leaves_readable_events(tmp_path: Path, sender_too: bool) -> None:
    run_dir = tmp_path / "victim"
    training = subprocess.Popen(
        [sys.executable, "-c", TRACKED, str(run_dir)], stdout=subprocess.PIPE, text=True
    )
    assert training.stdout is not None
    sender = int(training.stdout.readline())

    def report() -> dict:
        return read_json(run_dir / "logs" / "tensorboard.json")

    until(lambda: report().get("sent_step") == 50)
    if sender_too:
        os.kill(sender, signal.SIGKILL)
    training.kill()
    training.wait()
    if not sender_too:
        until(lambda: report().get("status") == "KILLED")
    assert shown(run_dir)["train/loss"] == losses(50)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 51, "tokens": 51, "train/loss": 0.25}\n')
    until(lambda: finalize_run(run_dir, "FAILED"))
    assert shown(run_dir)["train/loss"] == [*losses(50), (51, 0.25)]
    assert report()["status"] == "FAILED"


def test_a_sender_killed_before_it_noted_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_processes(monkeypatch)
    run_dir = tmp_path / "run"
    start(run_dir, 4, **HERE)

    def killed(self: Sent, error: str | None = None, remedy: str = "") -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        sender = begin_sending(run_dir, 3, **HERE)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Sent, "save", killed)
            sender.send()
    [noted] = read_json(run_dir / "logs" / "tensorboard.json")["files"]
    (run_dir / "tensorboard" / noted).open("ab").write(b"a torn event")  # of the next call
    start(run_dir, 1, **HERE)
    assert shown(run_dir)["train/loss"] == losses(11)


FULL = """
import resource, signal, sys
from pathlib import Path
import pytest
from tests.helpers import senders
from dnt_scale.record.sender import send_all
from dnt_scale.record.training_process import EndedTraining
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
senders.without_processes(pytest.MonkeyPatch())
run_dir = Path(sys.argv[1])
senders.start(run_dir, 20, backends=["tensorboard"])
sender = senders.begin(run_dir, 60, backends=["tensorboard"])
resource.setrlimit(resource.RLIMIT_FSIZE, (1200, resource.RLIM_INFINITY))
for _ in range(2):
    try:
        sender.send()
    except OSError as error:
        print(error.strerror)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
print(send_all(sender, EndedTraining("FINISHED")))
"""


def test_a_full_disk_leaves_nothing_in_part(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "run")], capture_output=True, text=True
    )
    assert said.stdout.splitlines()[-3:] == ["File too large", "File too large", "0"], said.stderr
    assert shown(tmp_path / "run")["train/loss"] == losses(80)


def test_folders_that_are_copied_moved_or_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_processes(monkeypatch)
    a, b, c = (tmp_path / name for name in "abc")
    start(a, 3, **HERE)
    subprocess.run(["cp", "-a", a, b], check=True)
    start(a, 1, **HERE)
    start(b, 2, **HERE)
    b.rename(c)
    start(c, 1, **HERE)
    assert (shown(a)["train/loss"], shown(c)["train/loss"]) == (losses(4), losses(6))
    shutil.rmtree(c / "logs")
    start(c, 1, **HERE)  # what was there is not known to be of this run: it is set aside
    assert shown(c)["train/loss"] == losses(7)
    shutil.rmtree(c / "tensorboard")
    start(c, 1, **HERE)
    assert shown(c)["train/loss"] == losses(8)
    sender = begin_sending(c, 1, **HERE)
    assert sender.send()
    shutil.rmtree(c / "tensorboard")  # while it is at work
    assert send_all(sender, EndedTraining("FINISHED")) == 0
    start(c, 1, **HERE)
    assert shown(c)["train/loss"] == losses(10)
    start(c, 1, run_id="another", **HERE)
    assert shown(c)["train/loss"] == losses(11)


def test_fresh_moves_the_events_aside(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_processes(monkeypatch)
    run_dir = tmp_path / "tiny"
    start(run_dir, 3, **HERE)
    run = config.load(tiny(corpus, run_dir, "tracking=tensorboard"))
    begun = begin(run, Typed(whole=True), fresh=True)
    make_room(Begun(run, begun.start))
    [aside] = run_dir.glob("before-*")
    assert shown(aside)["train/loss"] == losses(3) and not (run_dir / "tensorboard").exists()


def test_pictures_are_shown_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_processes(monkeypatch)
    run_dir = tmp_path / "run"
    start(run_dir, 3, **HERE)
    start(run_dir, 1, **HERE)
    assert "plots/loss" not in others(run_dir)
    for number in range(3):
        if number != 1:
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(f'{{"step": {5 + number}, "tokens": {number}, "train/loss": 2.0}}\n')
        plot_run(run_dir)
        start(run_dir, 0, **HERE)
    assert len(others(run_dir)["plots/loss"]) == 2


def test_without_the_package_it_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Python's own way to say that there is none
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    needs = r"tracking\.backends: tensorboard needs a package .*; "
    install = needs + r"pip install 'dnt-scale\[tensorboard\]'"
    with pytest.raises(ValueError, match=install):
        check_backends(["mlflow", "tensorboard"])
    run = config.load(tiny(corpus, tmp_path / "run", "tracking=tensorboard"))
    with pytest.raises(ValueError, match=install):
        begin(
            run.model_copy(update={"tracking": run.tracking.model_copy(update={"enabled": True})}),
            Typed(whole=True),
        )
    begin(
        run.model_copy(update={"tracking": run.tracking.model_copy(update={"enabled": False})}),
        Typed(whole=True),
    )
    assert not (tmp_path / "run").exists()
