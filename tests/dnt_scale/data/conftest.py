from pathlib import Path

import pytest

from testbed.images import small_image_set
from tests.helpers.image_sources import TRAIN, VAL


@pytest.fixture(scope="module")
def image_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of TRAIN and VAL images of 32 pixels, of a module's own."""
    out = tmp_path_factory.mktemp("images") / "set"
    small_image_set(out, train=TRAIN, val=VAL)
    return out
