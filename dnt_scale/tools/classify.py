"""`dnt classify`: the likeliest classes of images, by a trained run."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps

from dnt_scale.config import ConfigError
from dnt_scale.data.augment import as_array, middle_box, resized
from dnt_scale.data.images import ImageSource
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.model.vit import VisionTransformer
from dnt_scale.tools.inference import Trained, load_checkpoint

SHOWN = 5  # classes of an image


class Guess(NamedTuple):
    """A class of an image, and its probability, 0 to 1."""

    name: str
    probability: float


class Unreadable(NamedTuple):
    """Why an image has no guesses."""

    why: str


@torch.inference_mode()
def classify(
    trained: Trained, images: Sequence[Path], data: Path | None, ranks: Ranks
) -> Iterator[tuple[Path, list[Guess] | Unreadable]]:
    """Yield each image with its ``SHOWN`` likeliest classes, the likeliest first, or with why there
    are none.

    Args:
        data: a set of the run's classes, where the run's own has moved.

    Raises:
        ValueError: the run is of no images, or as ``load_checkpoint`` does.
    """
    model, source = load_checkpoint(trained, data, ranks)
    if not isinstance(model, VisionTransformer) or not isinstance(source, ImageSource):
        raise ConfigError(
            f"{trained.folder}: model.kind is {trained.run.model.kind}, which does not classify "
            "images; measure it with `dnt eval`"
        )
    names = source.rows.class_names
    for path in images:
        try:
            with Image.open(path) as opened:
                image = ImageOps.exif_transpose(opened.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            why = f"cannot be read as an image ({error})"
            if path.is_dir():
                why = f"is a folder; name the images in it, such as {path}/*.jpg"
            yield path, Unreadable(why if path.exists() else "no such file")
            continue
        box = middle_box(*image.size, source.data.center)
        pixels = as_array(resized(image, source.data.size, box))
        batch = torch.from_numpy(pixels.copy())[None].to(ranks.device)
        probabilities = model(batch)[0].float().softmax(0)
        best = probabilities.topk(min(SHOWN, len(names)))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        yield path, [Guess(names[label], probability) for label, probability in found]
