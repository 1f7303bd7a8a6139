import os
import shutil
import signal
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from testbed import run
from testbed.corpus import small_set
from testbed.run import tiny, train
from tests.helpers.once import Once, made_once
from tests.helpers.slurm import LEFT_OUT

# A shell starts what it runs in the background with SIGINT ignored, and nohup what it runs with
# SIGHUP, which children
# inherit: tests of Ctrl-C and of a terminal that goes need them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n` the tests of a file stay on one worker, where they share its fixtures; so do all
    files that share SLURM.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "slurm" if uses_slurm(config.rootpath / file) else file

    return ByFile(config, log)


@cache
def uses_slurm(file: Path) -> bool:
    """Return whether a file of tests asks for the sandbox: the scheduler has only its name."""
    return 'usefixtures("slurm")' in file.read_text()


STARTS_RANKS = [run.train, run.start, run.call, run.stop_midway, run.dnt, run.Ranks]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make quick` leaves out: tests on SLURM, and those of files that start processes
    of training.
    """
    for item in items:
        if "slurm" in getattr(item, "fixturenames", ()):
            assert uses_slurm(item.path), f"{item.nodeid}: ask for it by usefixtures"
            item.add_marker("slurm")
        if any(
            found in STARTS_RANKS
            for found in vars(getattr(item, "module", run)).values()
            if callable(found)
        ):
            item.add_marker("ranks")


@pytest.hookimpl(trylast=True)  # at the end, where it is seen
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", ())]
    if left_out := [reason.partition(LEFT_OUT)[2] for reason in reasons if LEFT_OUT in reason]:
        terminalreporter.write_line(f"{len(left_out)} {LEFT_OUT}{left_out[0]}", red=True, bold=True)


@pytest.fixture(autouse=True)
def same_priority() -> Iterator[None]:
    """Refuse a test that leaves this process nicer: beside others all later ones would starve."""
    before = os.nice(0)
    yield
    assert os.nice(0) == before, f"niceness was {before} before the test and is {os.nice(0)} now"


@pytest.fixture(scope="session")
def once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`made_once`, in the folder that all workers share."""
    base = tmp_path_factory.getbasetemp()
    return partial(made_once, base.parent if hasattr(request.config, "workerinput") else base)


@pytest.fixture(scope="session")
def corpus(once: Once) -> Path:
    """A small set of real text, to be read only."""
    return once("corpus", lambda folder: small_set(folder / "set")) / "set"


@pytest.fixture(scope="session")
def reference(corpus: Path, once: Once) -> Path:
    """The folder of an uninterrupted run: 20 steps on 2 ranks, checkpoints at 6, 12, 18 and 20.
    To be read only.
    """

    def make(folder: Path) -> None:
        train(tiny(corpus, folder / "tiny", "checkpoint.keep=9"), ranks=2).ok()

    return once("reference", make) / "tiny"


@pytest.fixture
def finished_run(reference: Path, tmp_path: Path) -> Path:
    """A copy of the reference run, to be resumed or damaged."""
    return Path(shutil.copytree(reference, tmp_path / "run", symlinks=True))
