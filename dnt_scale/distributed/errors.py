"""Errors of a run that all ranks share, and what each means for the exit status."""

import errno

import torch


class AgreedError(ValueError):
    """A fault that every rank raises, with the same message: rank 0's report is enough."""


class Fault(ValueError):
    """Nothing that the user has to mend in the run: another try, perhaps on other nodes, may go
    well.
    """


class AgreedFault(Fault, AgreedError):
    """A fault that every rank raises with the same message."""


# what a disk or a file server says that fails, not one that is asked for what it cannot do
FAILING = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.ENODEV,
    errno.EREMOTEIO,
}


def is_fault(error: BaseException) -> bool:
    """Whether another try may go well without anybody mending anything in the run; what it was
    raised from counts.
    """
    if isinstance(error, Fault) or (isinstance(error, OSError) and error.errno in FAILING):
        return True
    behind = error.__cause__ or error.__context__
    return behind is not None and is_fault(behind)


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank ended, rather than for a fault of this
    one.
    """
    signs = (
        "closed by peer",
        "reset by peer",
        "Broken pipe",
        "remote process exited",
        "peer has left",
    )
    return any(sign in str(error) for sign in signs)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = (
        "can't allocate memory",
        "Cannot allocate memory",
        "DefaultCPUAllocator",
        "out of memory",
        "bad_alloc",
    )
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error) for sign in signs)


def exit_status(error: BaseException) -> int:
    """Return the status that ``error`` ends its rank with: 2 where the user has to mend something.

    It is 1 where another try may go well, and for a bug, as Python has it.
    """
    told = isinstance(error, ValueError | OSError | MemoryError) or out_of_memory(error)
    return 2 if told and not is_fault(error) else 1
