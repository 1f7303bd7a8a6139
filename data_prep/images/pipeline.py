"""From images with a class each to a set of shards: plan, decode in chunks, choose, pack, publish.

As with text (data_prep.pipeline), each stage leaves its result in the work folder under a name that
is a hash of all it was made from. So a rerun after kill -9 goes on where it was, and the N tasks of
one plan are N processes that fill the same folder.
"""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from data_prep.images.chunks import make_image_chunks, recipe_of
from data_prep.images.finish import finish
from data_prep.images.inputs import all_units, find_inputs
from data_prep.images.options import ImageOptions, checked, read_val_list
from data_prep.images.shards import ImageManifest, load_manifest
from data_prep.pipeline import units_of_task
from data_prep.report.markup import visible
from data_prep.work_folder import work_folder


def prepare_images(options: ImageOptions, console: Console | None = None) -> ImageManifest | None:
    """Make an image set in `options.out`, which appears whole or not at all; progress goes to
    stderr.

    What is finished is kept through Ctrl-C, kill -9 and errors: the same call goes on from there,
    to the same bytes. Returns the manifest, or None for a task.

    Raises ValueError, in one or two lines, for: bad options or input, a folder that already holds a
    set, labels that no class has, a split without images, a full disk.
    """
    console = console or Console(stderr=True)
    base = load_manifest(options.append) if options.append else None
    options = checked(options, base)
    recipe = recipe_of(options)
    val = None if options.val_list else options.val
    with work_folder(Path(options.out), shared=options.task is not None) as work:
        inputs = find_inputs(options.inputs, val)
        units = all_units(inputs)
        mine = units_of_task(units, *options.task) if options.task else list(range(len(units)))
        folders = recipe.folders(work, units)
        paths = make_image_chunks(
            recipe,
            [units[number] for number in mine],
            [folders[number] for number in mine],
            options.processes,
            console,
        )
        if options.task:
            console.print(
                f"task {options.task[0]} of {options.task[1]} is done; when all are, the same "
                f"command without --task makes the set in {escape(visible(str(options.out)))}",
                highlight=False,
            )
            return None
        if all_units(find_inputs(options.inputs, val)) != units:
            raise ValueError("the input changed while it was read; run the command again")
        manifest = finish(work, options, base, inputs, paths, console)
    images = ", ".join(f"{split.images:,} {name}" for name, split in manifest.splits.items())
    console.print(
        f"wrote     {escape(visible(str(options.out)))}: {images} images", highlight=False
    )
    return manifest


def count_units(options: ImageOptions) -> int:
    """Return how many units the input has, once nothing that is known before it is read speaks
    against preparing it. Raises ValueError as `prepare_images` does."""
    options = checked(options, load_manifest(options.append) if options.append else None)
    read_val_list(options)
    return len(all_units(find_inputs(options.inputs, None if options.val_list else options.val)))
