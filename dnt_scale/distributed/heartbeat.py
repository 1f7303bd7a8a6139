"""Where the main thread is: told by whoever gets on, read by the watchdog. No torch, so that
anybody may call it.
"""

from dataclasses import dataclass


@dataclass
class MainThread:
    """How often the main thread has told that it moves, and what it does."""

    beats: int = 0
    moves: int = 0
    where: str = "the start"


main_thread = MainThread()


def beat(where: str) -> None:
    """The main thread moves: it is now at ``where``, for example "step 118". Costs nothing to
    speak of.
    """
    main_thread.beats += 1
    main_thread.where = where


def moving() -> None:
    """The main thread moves inside of what it told last: bytes are read, another thread it waits
    for gets on.

    Ranks need not do so equally often, so these do not tell who is behind.
    """
    main_thread.moves += 1
