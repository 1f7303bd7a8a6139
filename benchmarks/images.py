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

Below that, a GB of images is read without decoding: in the order of training, with their checksums,
by one process for which another tells the disk what comes next, as in training; and beside it the
same tars from beginning to end, as `cat` reads them. Both from the page cache, and from the disk:
before each of these, the tars' pages are dropped from the cache (POSIX_FADV_DONTNEED). Where other
work takes the processors, the rates say little of the disk; so the table has processor time too.
"""

import argparse
import contextlib
import datetime
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data_prep.images.options import ImageOptions
from data_prep.images.pipeline import prepare_images
from data_prep.images.shards import (
    ImageManifest,
    Sample,
    SplitReader,
    load_manifest,
    write_manifest,
    write_shard,
)
from data_prep.set_files import shard_name
from dnt_scale.config import ImagesConfig
from dnt_scale.data.image_reader import image_order, numbers_at
from dnt_scale.data.images import ImageSource, open_images
from dnt_scale.record.files import git_commit

WIDTH, HEIGHT, SIZE, CLASSES = 500, 375, 224, 10
SEED = 1
OURS, TORCHVISION, WEBDATASET = "ours", "torchvision ImageFolder, DataLoader", "webdataset"
WANTED = {TORCHVISION: 1.3, WEBDATASET: 1.0}
READ_WANTED = 0.9  # of the tars from beginning to end, from the disk
IN_ORDER, WHOLE = "ours, an image a read, with CRC-32", "the tars from beginning to end"
BATCH = 64  # rows, of what is read alone
READ_BYTES = 1_000_000_000  # of the images that are read alone, so that their start counts little


class Read(NamedTuple):
    """MB a second by the clock, and seconds of processor time a GB, of all processes."""

    mb_per_s: float
    cpu_s_per_gb: float


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
        reads: dict[str, dict[str, list[Read]]] = {
            whence: {IN_ORDER: [], WHOLE: []} for whence in ("disk", "page cache")
        }
        large = Path(place, "large")
        write_repeated(made, large)
        with reader_in_order(large) as read_in_order:
            ways = {IN_ORDER: read_in_order, WHOLE: lambda: read_tars(large)}
            for _ in range(options.rounds):
                for whence, found in reads.items():
                    for name, read in ways.items():
                        if whence == "disk":
                            drop_from_cache(large)
                        found[name].append(read())

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
        "load": os.getloadavg(),
        "dropped_from_cache_by": "fsync, then posix_fadvise(POSIX_FADV_DONTNEED) of each tar",
        "read": {
            place: {
                name: Read(*map(statistics.median, zip(*rounds, strict=True)))._asdict()
                for name, rounds in found.items()
            }
            for place, found in reads.items()
        },
        "read_ratio": {
            place: ratio(*([each.mb_per_s for each in rounds] for rounds in found.values()))
            for place, found in reads.items()
        },
        "read_wanted": READ_WANTED,
        "read_mb_per_s_of_rounds": {
            place: {name: [each.mb_per_s for each in rounds] for name, rounds in found.items()}
            for place, found in reads.items()
        },
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


def write_repeated(made: Path, out: Path) -> None:
    """Write a set of the same images again and again, until they are READ_BYTES."""
    manifest = load_manifest(made)
    split = manifest.splits["train"]
    times = -(-READ_BYTES // split.image_bytes)
    out.mkdir()
    shards = []
    with contextlib.closing(SplitReader(made, manifest, "train")) as reader:
        rows = [row.tolist() for row in reader.index[["label", "width", "height", "pixels"]]]
        for turn in range(times):
            samples = (
                Sample(reader.read(number), label, width, height, tuple(pixels))
                for number, (label, width, height, pixels) in enumerate(rows)
            )
            name = shard_name("train", turn)
            shards.append(write_shard(out / name, name, samples, turn * len(reader)))
    more = manifest.model_dump(mode="json")
    more["splits"]["train"] = {
        "images": split.images * times,
        "image_bytes": split.image_bytes * times,
        "shards": [shard.model_dump(mode="json") for shard in shards],
    }
    for each in more["classes"]:
        each["images"]["train"] *= times
    for each in more["sources"]:
        each["images"] *= times
        each["image_bytes"] *= times
    write_manifest(out, ImageManifest.model_validate_json(json.dumps(more)))


# --- who reads ------------------------------------------------------------------------------------


@contextlib.contextmanager
def our_batches(made: Path, batch: int) -> Iterator[Iterator[Tensor]]:
    """Our stream, as training uses it, decoding in its own thread."""
    with our_source(made).stream(seed=SEED, global_batch=batch, rank=0, world_size=1) as stream:
        yield (found["image"] for found, _ in stream)


def our_source(made: Path) -> ImageSource:
    data = {"path": made, "size": SIZE, "augment": "simple", "workers": 0}
    return open_images(ImagesConfig.model_validate(data))


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


@contextlib.contextmanager
def reader_in_order(made: Path) -> Iterator[Callable[[], Read]]:
    """Lend what reads all images in the order of training, by a process that this one tells the
    disk for what comes next."""
    spawn = multiprocessing.get_context("spawn")
    mine, its = spawn.Pipe()
    process = spawn.Process(target=serve_reads, args=(made, its), daemon=True)
    process.start()
    source = our_source(made)
    mine.recv()  # it is there

    def read() -> Read:
        started, cpu = time.perf_counter(), time.process_time()
        mine.send("read")
        with contextlib.closing(source.ahead(source.reading(SEED), 0, BATCH, BATCH)) as ahead:
            while not isinstance(found := mine.recv(), tuple):
                ahead.use(found)
            took = time.perf_counter() - started
        size, its_cpu = found
        return Read(size / took / 1e6, (its_cpu + time.process_time() - cpu) / size * 1e9)

    try:
        yield read
    finally:
        mine.close()
        process.join()


def serve_reads(made: Path, asked: Connection) -> None:
    """Read all images in the order of training whenever asked; tell of every ``BATCH`` images,
    at last of their bytes and the seconds of processor time."""
    with contextlib.closing(SplitReader(made, load_manifest(made), "train")) as reader:
        numbers = numbers_at(image_order(len(reader), SEED), 0, len(reader)).tolist()
        asked.send("there")
        with contextlib.suppress(EOFError):
            while asked.recv():
                size, started = 0, time.process_time()
                for place, number in enumerate(numbers, 1):
                    size += len(reader.read(number))
                    if place % BATCH == 0:
                        asked.send(BATCH)
                asked.send((size, time.process_time() - started))


def read_tars(made: Path) -> Read:
    """Read the tars from beginning to end, a MB at a time."""
    buffer = memoryview(bytearray(1 << 20))
    started, cpu = time.perf_counter(), time.process_time()
    size = 0
    for path in sorted(made.glob("train-*.tar")):
        with path.open("rb", buffering=0) as file:
            while found := file.readinto(buffer):
                size += found
    took = time.perf_counter() - started
    return Read(size / took / 1e6, (time.process_time() - cpu) / size * 1e9)


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
    table.add_column("reading alone", justify="right")
    for place in result["read"]:
        table.add_column(f"MB/s, from the {place}", justify="right")
        table.add_column("processor s a GB", justify="right")
    for name in (IN_ORDER, WHOLE):
        found = [each[name] for each in result["read"].values()]
        cells = [(f"{each['mb_per_s']:,.0f}", f"{each['cpu_s_per_gb']:.2f}") for each in found]
        table.add_row(name, *itertools.chain(*cells))
    ratios = [(f"{each:.2f}", "") for each in result["read_ratio"].values()]
    table.add_row(f"ratio, from the disk {READ_WANTED} wanted", *itertools.chain(*ratios))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
