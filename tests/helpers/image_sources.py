"""Sources of images on the set of the fixture `image_set`."""

from pathlib import Path
from typing import Any

from dnt_scale.config import ImagesConfig
from dnt_scale.data.images import ImageSource, open_images

TRAIN, VAL = 100, 23  # images of the set


def source(folder: Path, recipe: Any = "deit", **changes: Any) -> ImageSource:
    """Open a set, to be decoded in this process to 32 pixels a side."""
    fields = {"path": folder, "size": 32, "augment": recipe, "workers": 0}
    return open_images(ImagesConfig.model_validate(fields | changes))
