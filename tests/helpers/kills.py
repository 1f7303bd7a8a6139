"""A process that prepares a set and is killed by kill -9 before a step of its own choosing: what it
opens, renames, links, makes or removes in a folder.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

STEPS = ("open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir")
Values = dict[str, tuple[Any, object]]  # a module's name for something, the module, its value


def watch(folder: Path, step: Callable[[str], None]) -> Callable[[], None]:
    """Call `step` with the name of whatever is opened, renamed, linked, made or removed in a
    folder, right before that is done; until the function that comes back is called. For one process
    it is always the same sequence."""
    watching = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in STEPS and isinstance(arguments[0], str | Path):
            path = Path(arguments[0])
            if path.is_relative_to(folder):
                step(path.name)

    def stop() -> None:
        nonlocal watching
        watching = False

    sys.addaudithook(hook)
    return stop


def _prepare_until(
    prepare: Callable[..., object], options: Any, small: dict[str, tuple[str, object]], last: int
) -> None:
    """Be the process that is to be killed before its step of number `last`."""
    for name, (module, value) in small.items():
        setattr(sys.modules[module], name, value)
    done = 0

    def step(name: str) -> None:
        nonlocal done
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1

    watch(options.out, step)
    prepare(options, Console(quiet=True))


def killed(
    prepare: Callable[..., object], options: Any, small: Values, last: int, preload: list[str]
) -> None:
    """Prepare up to a step and no further, in a process that is not forked from this one, as its
    libraries thread.

    Args:
        prepare: a function of a module, given ``options`` and a console.
        small: what stands in for values of modules, so that little input has many parts.
        preload: what the process imports once for all its like.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload, __name__])
    named = {name: (module.__name__, value) for name, (module, value) in small.items()}
    child = context.Process(target=_prepare_until, args=(prepare, options, named, last))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
