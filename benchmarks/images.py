"""Images a second of one core, from JPEGs to batches: our stream beside torch's DataLoader over
torchvision's ImageFolder, and beside webdataset, with the same transforms.

    python -m benchmarks.images

Each is one process with one thread and gives batches of --batch rows of uint8, (3, 224, 224), out
of the same JPEGs in the page cache: a random crop of 8 to 100 % of the area, every second one
mirrored, the recipe `simple`. The JPEGs, 500 pixels wide, quality 90, are parts of the photographs
that scikit-learn ships. They take turns; the table has medians of --rounds rounds, of the rates, in
images a second of processor time, and of the ratios, so that other work on the machine counts
little.

torchvision is no dependency: `pip install --no-deps --target FOLDER torchvision`, and PYTHONPATH
names FOLDER. Beside a torch for CPUs the import of PyPI's build ends at operators of its own, which
nothing here uses; two of their names are declared first, so that its unchanged code of ImageFolder
and of the transforms runs.

Below that, images are read without decoding: in the order of training, with their checksums, and
beside it the same tars from beginning to end; from the page cache, and from the disk, whose pages
are dropped from the cache before. As in training, as many images are on their way from the disk as
eight processes have in hand.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data_prep.images.options import ImageOptions
from data_prep.images.pipeline import prepare_images
from data_prep.images.shards import SplitReader, load_manifest
from dnt_scale.config import ImagesConfig
from dnt_scale.data.decoders import IN_HAND
from dnt_scale.data.image_reader import image_order, number_at
from dnt_scale.data.images import JOB_ROWS, open_images
from dnt_scale.record.files import git_commit

WIDTH, HEIGHT, SIZE, CLASSES = 500, 375, 224, 10
SEED = 1
OURS, TORCHVISION, WEBDATASET = "ours", "torchvision ImageFolder, DataLoader", "webdataset"
WANTED = {TORCHVISION: 1.3, WEBDATASET: 1.0}
IN_ORDER, WHOLE = "ours, an image a read, with CRC-32", "the tars from beginning to end"
AHEAD = 8 * IN_HAND * JOB_ROWS  # images


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000, help="JPEGs in the set")
    parser.add_argument("--batch", type=int, default=64, help="rows a batch")
    parser.add_argument("--batches", type=int, default=8, help="batches a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as place:
        folder, made = Path(place, "folders"), Path(place, "set")
        write_folders(folder, options.images)
        prepare_images(
            ImageOptions([folder], made, val_fraction=0, shard_bytes=32_000_000),
            Console(quiet=True),
        )
        peers: dict[str, Callable[[], contextlib.AbstractContextManager[Iterator[Tensor]]]] = {
            OURS: lambda: our_batches(made, options.batch),
            TORCHVISION: lambda: torchvision_batches(folder, options.batch),
            WEBDATASET: lambda: webdataset_batches(made, options.batch),
        }
        rounds: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(options.rounds):
            for name, batches in peers.items():
                rounds[name].append(images_per_s(batches, options.batches))
        reads: dict[str, dict[str, list[float]]] = {
            place: {IN_ORDER: [], WHOLE: []} for place in ("disk", "page cache")
        }
        for _ in range(options.rounds):
            for place, found in reads.items():
                for name, rate in ((IN_ORDER, rate_in_order), (WHOLE, rate_of_tars)):
                    if place == "disk":
                        drop_from_cache(made)
                    found[name].append(rate(made))

    rates = {name: statistics.median(found) for name, found in rounds.items()}
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "device": f"{os.cpu_count()}-core CPU",
        "torch": torch.__version__,
        "images": options.images,
        "batch": options.batch,
        "images_per_cpu_s": rates,
        "images_per_cpu_s_of_rounds": rounds,
        "ratios": {name: ratio(rounds[OURS], rounds[name]) for name in WANTED},
        "wanted": WANTED,
        "read_mb_per_s": {
            place: {name: statistics.median(rates) for name, rates in found.items()}
            for place, found in reads.items()
        },
        "read_ratio": {
            place: ratio(found[IN_ORDER], found[WHOLE]) for place, found in reads.items()
        },
        "read_mb_per_s_of_rounds": reads,
    }
    show(result)
    name = f"images-{result['device'].replace(' ', '-')}.json"
    out = options.out or Path(__file__).parent / "results" / name
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}")


# --- what is read ---------------------------------------------------------------------------------


def write_folders(folder: Path, images: int) -> None:
    """Write JPEGs of 4:3 as FOLDER/CLASS/NUMBER.jpg: parts of two photographs, 427 pixels high and
    up to 20 % enlarged, from a seeded place on."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draw = np.random.default_rng(SEED)
    for number in range(images):
        photograph = photographs[number % len(photographs)]
        width = int(draw.integers(WIDTH * 5 // 6, min(photograph.width, WIDTH * 9 // 8)))
        height = width * HEIGHT // WIDTH
        left = int(draw.integers(0, photograph.width - width + 1))
        top = int(draw.integers(0, photograph.height - height + 1))
        part = photograph.resize(
            (WIDTH, HEIGHT), Image.Resampling.BICUBIC, (left, top, left + width, top + height)
        )
        file = io.BytesIO()
        part.save(file, "JPEG", quality=90)
        path = folder / str(number % CLASSES) / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())


# --- who reads ------------------------------------------------------------------------------------


@contextlib.contextmanager
def our_batches(made: Path, batch: int) -> Iterator[Iterator[Tensor]]:
    """Our stream, as training uses it, decoding in its own thread."""
    data = {"path": made, "size": SIZE, "augment": "simple", "workers": 0}
    source = open_images(ImagesConfig.model_validate(data))
    with source.stream(seed=SEED, global_batch=batch, rank=0, world_size=1) as stream:
        yield (found["image"] for found, _ in stream)


@contextlib.contextmanager
def torchvision_batches(folder: Path, batch: int) -> Iterator[Iterator[Tensor]]:
    """torch's DataLoader over torchvision's ImageFolder, in its own process."""
    transforms = transforms_of_torchvision()
    from torchvision.datasets import ImageFolder

    loader = torch.utils.data.DataLoader(
        ImageFolder(str(folder), transforms), batch_size=batch, shuffle=True, num_workers=0
    )
    yield (images for images, _ in forever(loader))


@contextlib.contextmanager
def webdataset_batches(made: Path, batch: int) -> Iterator[Iterator[Tensor]]:
    """webdataset over our tars, with torchvision's transforms."""
    transform = transforms_of_torchvision()
    tars = [str(path) for path in sorted(made.glob("train-*.tar"))]
    samples = webdataset.WebDataset(tars, shardshuffle=False).shuffle(256).decode("pil")
    pairs = samples.to_tuple("jpg", "cls").map_tuple(transform, lambda label: label)
    yield (images for images, _ in forever(pairs.batched(batch, partial=False)))


def transforms_of_torchvision() -> Any:
    """Return its transforms for an image of Pillow's."""
    if "torchvision" not in sys.modules and torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        LIBRARIES.append(library)
    from torchvision.transforms import (
        Compose,
        PILToTensor,
        RandomHorizontalFlip,
        RandomResizedCrop,
    )

    steps = [RandomResizedCrop(SIZE), RandomHorizontalFlip(), PILToTensor()]
    return Compose(steps)


LIBRARIES: list[torch.library.Library] = []  # what is declared goes with its library


def ratio(ours: list[float], others: list[float]) -> float:
    """Return the median of the rounds' ratios: other work on the machine changes from round to
    round."""
    return statistics.median(one / other for one, other in zip(ours, others, strict=True))


def forever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def images_per_s(
    batches: Callable[[], contextlib.AbstractContextManager[Iterator[Tensor]]], count: int
) -> float:
    """Images a second of this process's time, from the third batch on."""
    with batches() as found:
        for _ in range(2):
            next(found)
        started = time.process_time()
        images = 0
        for _ in range(count):
            batch = next(found)
            assert batch.dtype == torch.uint8 and batch.shape[1:] == (3, SIZE, SIZE)
            images += len(batch)
        return images / (time.process_time() - started)


# --- reading alone --------------------------------------------------------------------------------


def drop_from_cache(made: Path) -> None:
    for path in made.glob("train-*.tar"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate_in_order(made: Path) -> float:
    """MB a second of all images in the order of training, which a thread has the disk bring ahead,
    as in a process that decodes."""
    with contextlib.closing(SplitReader(made, load_manifest(made), "train")) as reader:
        order = image_order(len(reader), SEED)
        numbers = [number_at(order, position) for position in range(len(reader))]
        jobs: Queue[list[int]] = Queue(AHEAD // JOB_ROWS)
        started = time.perf_counter()

        def expect() -> None:
            for place in range(0, len(numbers), JOB_ROWS):
                job = numbers[place : place + JOB_ROWS]
                reader.expect(job)
                jobs.put(job)

        thread = Thread(target=expect)
        thread.start()
        size, left = 0, len(numbers)
        while left:
            for number in (job := jobs.get()):
                size += len(reader.read(number))
            left -= len(job)
        thread.join()
        return size / (time.perf_counter() - started) / 1e6


def rate_of_tars(made: Path) -> float:
    """MB a second of the tars, a MB at a time."""
    buffer = memoryview(bytearray(1 << 20))
    started = time.perf_counter()
    size = 0
    for path in sorted(made.glob("train-*.tar")):
        with path.open("rb", buffering=0) as file:
            while found := file.readinto(buffer):
                size += found
    return size / (time.perf_counter() - started) / 1e6


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['device']}, {result['date']}, {result['commit'][:12]}")
    for column in ("one process, one thread", "images/s a core", "ours against it", "wanted"):
        table.add_column(column, justify="right")
    for name, rate in result["images_per_cpu_s"].items():
        against = f"{result['ratios'][name]:.2f}" if name in WANTED else ""
        wanted = f"{WANTED[name]:.1f}" if name in WANTED else ""
        table.add_row(name, f"{rate:,.0f}", against, wanted)
    Console(width=110).print(table)
    table = Table()
    for column in (
        "reading alone",
        *(f"MB/s, from the {each}" for each in result["read_mb_per_s"]),
    ):
        table.add_column(column, justify="right")
    for name in (IN_ORDER, WHOLE):
        table.add_row(name, *(f"{rates[name]:,.0f}" for rates in result["read_mb_per_s"].values()))
    table.add_row("ratio", *(f"{each:.2f}" for each in result["read_ratio"].values()))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
