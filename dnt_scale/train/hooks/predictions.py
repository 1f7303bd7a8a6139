"""Show what an image classifier takes validation images for: RUN/plots/predictions.png."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from dnt_scale.config import ImagesConfig
from dnt_scale.distributed import device_metrics
from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Step, Training
from dnt_scale.train.validation import watched

if TYPE_CHECKING:
    from PIL import Image, ImageFont

SHOWN, COLUMNS = 32, 8
SIDE, LINE, GAP = 112, 16, 8  # pixels: of an image, a line of text, and between images
RIGHT, WRONG, INK = "#2e7d32", "#c62828", "#333333"


class Predictions(Hook):
    """Draws ``SHOWN`` images, evenly spread over the validation split, after each validation.

    The picture is replaced each time; trackers have the newest.
    """

    def after_step(self, run: Training, step: Step) -> None:
        """Classify the images on all ranks alike, and draw them on the first."""
        data = run.config.data
        if "val/top1" not in step.metrics or not isinstance(data, ImagesConfig):
            return
        with run.clock.spending("eval"):
            images, labels, probabilities = classified(run)
            if run.ranks.first:
                title = f"{run.config.run.name}, step {step.number:,}: "
                title += f"validation top-1 {step.metrics['val/top1']:.4f}"
                names = run.source.rows.class_names
                with suppress(OSError):  # a full disk ends no run here
                    path = run.config.run.dir / "plots" / "predictions.png"
                    save(sheet(images, labels, probabilities, names, title), path)


def classified(run: Training) -> tuple[Tensor, Tensor, Tensor]:
    """Return the images (N, 3, S, S), their labels (N,) and each class's probability (N, K), on the
    host. A collective.

    An engine tells means only, so the classifier's output is taken as it passes.
    """
    from dnt_scale.model.batch import IGNORED
    from dnt_scale.model.vit import VisionTransformer

    found: list[Tensor] = []

    def keep(module: nn.Module, _: Any, logits: Tensor) -> None:
        if isinstance(module, VisionTransformer):
            found.append(logits.float().softmax(1).cpu())

    size = min(run.config.train.rows_a_forward, SHOWN)
    sets = run.source.validation(rows=SHOWN, micro_batch=size, rank=0, world_size=1)
    batches = [batch for batch in sets[""] if isinstance(batch, dict)]
    with device_metrics.ignored(), register_module_forward_hook(keep):
        run.engine.evaluate(watched(batches))
    images, labels = (torch.cat([batch[name] for batch in batches]) for name in ("image", "label"))
    real = labels != IGNORED
    return images[real], labels[real], torch.cat(found)[real]


def sheet(
    images: Tensor, labels: Tensor, probabilities: Tensor, names: tuple[str, ...], title: str
) -> "Image.Image":
    """Draw the images, each with its class, and below it the likeliest one with its probability."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(  # Pillow's own has no letters but English ones
        str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 11
    )
    columns, rows = min(COLUMNS, len(images)), -(-len(images) // COLUMNS)
    wide, high = SIDE + GAP, SIDE + 2 * LINE + GAP
    canvas = Image.new("RGB", (columns * wide + GAP, rows * high + LINE + 2 * GAP), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, GAP), title, INK, font)
    smooth = Image.Resampling.NEAREST if images.shape[-1] < SIDE else Image.Resampling.LANCZOS
    shares, best = probabilities.max(1)
    for place, (pixels, label, likeliest, share) in enumerate(
        zip(images, labels.tolist(), best.tolist(), shares.tolist(), strict=True)
    ):
        x, y = GAP + place % COLUMNS * wide, LINE + 2 * GAP + place // COLUMNS * high
        one = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        canvas.paste(one.resize((SIDE, SIDE), smooth), (x, y))
        number = f" {share:.2f}"
        draw.text((x, y + SIDE), shortened(names[label], font, SIDE), INK, font)
        guess = shortened(names[likeliest], font, SIDE - font.getlength(number)) + number
        draw.text((x, y + SIDE + LINE - 2), guess, RIGHT if likeliest == label else WRONG, font)
    return canvas


def shortened(text: str, font: "ImageFont.FreeTypeFont", width: float) -> str:
    """Return as much of a text as ``width`` pixels have room for."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def save(image: "Image.Image", path: Path) -> None:
    """Write a picture as PNG, in one piece. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    image.save(beside, format="PNG")
    beside.replace(path)
