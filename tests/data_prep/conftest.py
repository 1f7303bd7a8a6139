import shutil
from pathlib import Path

import pytest

from tests.helpers.corpus import small_set


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set, to be read only."""
    out = tmp_path_factory.mktemp("prepared") / "set"
    small_set(out)
    return out


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the small set, to be damaged."""
    return Path(shutil.copytree(prepared, tmp_path / "set"))
