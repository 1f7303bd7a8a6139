"""Milliseconds a core and image, from a JPEG in memory to what the model sees, by part and recipe.

    python -m benchmarks.image_decoding

The images are noise with the 1/f spectrum of photographs, 500 x 375 pixels, JPEGs of quality 90;
the model's are 224 pixels. `pip install simplejpeg` adds its decoder, a binding of libjpeg-turbo
that Pillow decodes with too. Time is the process's, so other work on the machine changes little.
"""

import argparse
import io
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from dnt_scale.config import AugmentSection
from dnt_scale.config.augment import AnyAugment
from dnt_scale.data.augment import IMAGE, augmented, decoded, draws

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
    images = [decoded(data) for data in stored]
    found = {"Pillow decodes": milliseconds(lambda i: decoded(stored[i % PICTURES]), options.times)}
    if find_spec("simplejpeg"):
        import simplejpeg

        found["simplejpeg decodes"] = milliseconds(
            lambda i: simplejpeg.decode_jpeg(stored[i % PICTURES], "RGB"), options.times
        )
    for name in ("none", "simple", "deit"):
        recipe = TypeAdapter[AugmentSection](AnyAugment).validate_python(name)
        found[f"{name} of what is decoded"] = milliseconds(
            lambda i, recipe=recipe: augmented(
                images[i % PICTURES], SIZE, 0.875, recipe, draws(0, i, IMAGE)
            ),
            options.times,
        )
    for what, value in found.items():
        print(f"{what:24} {value:6.2f} ms")
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
