import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from testbed.corpus import TEXT, small_set
from tests.helpers.once import Once

# How long an example takes depends on what else the machine does.
settings.register_profile(
    "any-load", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any-load")


@pytest.fixture(scope="session")
def prepared(once: Once) -> Path:
    """A small set, to be read only."""
    return once("corpus", lambda folder: small_set(folder / "set")) / "set"


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the small set, to be damaged."""
    return Path(shutil.copytree(prepared, tmp_path / "set"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(TEXT * (number + 1) + f"{number}\n")
    return folder
