"""Milliseconds a core and image, from a JPEG in memory to what the model sees, by part and recipe.

    python -m benchmarks.image_decoding

The images are noise with the 1/f spectrum of photographs, 500 x 375 pixels, JPEGs of quality 90;
the model's are 224 pixels. simplejpeg, which decodes them for training, is a binding of
libjpeg-turbo, as Pillow is. Time is the process's, so other work on the machine changes little.
"""

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image
from pydantic import TypeAdapter

from dnt_scale.config import AugmentSection
from dnt_scale.config.augment import AnyAugment
from dnt_scale.data.augment import IMAGE, augmented, draws

WIDTH, HEIGHT, SIZE = 500, 375, 224
PICTURES = 6


def picture(seed: int) -> bytes:
    """Return a JPEG of noise whose amplitude falls as 1 / frequency in each channel."""
    draw = np.random.default_rng(seed)
    across, down = np.fft.fftfreq(WIDTH) * WIDTH, np.fft.fftfreq(HEIGHT) * HEIGHT
    frequency = np.maximum(np.hypot(across, down[:, None]), 1)
    channels = []
    for _ in range(3):
        phases = np.exp(2j * np.pi * draw.random((HEIGHT, WIDTH)))
        noise = np.fft.ifft2(phases / frequency).real
        channels.append(128 + 50 * noise / noise.std())
    image = Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def milliseconds(work: Callable[[int], object], times: int) -> float:
    """Return the processor time of a call, which is given its number."""
    work(0)
    start = time.process_time()
    for number in range(times):
        work(number)
    return (time.process_time() - start) / times * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=100, help="images a measurement")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    stored = [picture(seed) for seed in range(PICTURES)]
    decoders: dict[str, Callable[[bytes], object]] = {
        "Pillow decodes": lambda data: Image.open(io.BytesIO(data)).convert("RGB"),
        "simplejpeg decodes": lambda data: simplejpeg.decode_jpeg(data, "RGB"),
    }
    found = {
        name: milliseconds(lambda i, decode=decode: decode(stored[i % PICTURES]), options.times)
        for name, decode in decoders.items()
    }
    for name in ("none", "simple", "deit"):
        recipe = TypeAdapter[AugmentSection](AnyAugment).validate_python(name)
        found[f"recipe {name}, decoding included"] = milliseconds(
            lambda i, recipe=recipe: augmented(
                stored[i % PICTURES], SIZE, 0.875, recipe, draws(0, i, IMAGE)
            ),
            options.times,
        )
    for what, value in found.items():
        print(f"{what:34} {value:6.2f} ms")
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
