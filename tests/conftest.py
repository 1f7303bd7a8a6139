import shutil
import signal
from pathlib import Path

import pytest

from tests.helpers.corpus import small_set
from tests.helpers.run import tiny, train
from tests.helpers.slurm import LEFT_OUT

# A shell starts what it runs in the background with SIGINT ignored, which children inherit: Ctrl-C tests need it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under xdist the tests of a file share its fixtures, on one worker; all that are on SLURM take turns."""
    for item in items:
        group = "cluster" if "cluster" in item.path.parts else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", ())]
    if left_out := [reason.partition(LEFT_OUT)[2] for reason in reasons if LEFT_OUT in reason]:
        terminalreporter.write_line(f"{len(left_out)} {LEFT_OUT}{left_out[0]}", red=True, bold=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set of real text, to be read only."""
    out = tmp_path_factory.mktemp("corpus") / "set"
    small_set(out)
    return out


@pytest.fixture(scope="session")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run: 20 steps on 2 ranks, checkpoints at 6, 12, 18 and 20. To be read only."""
    run_dir = tmp_path_factory.mktemp("reference") / "tiny"
    train(tiny(corpus, run_dir, "checkpoint.keep=9"), ranks=2).ok()
    return run_dir


@pytest.fixture
def finished_run(reference: Path, tmp_path: Path) -> Path:
    """A copy of the reference run, to be resumed or damaged."""
    return Path(shutil.copytree(reference, tmp_path / "run", symlinks=True))
