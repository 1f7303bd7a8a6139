import os
from collections.abc import Iterator

import pytest

from tests.helpers import slurm as sandbox


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """A real SLURM: the sandbox with node1 to node3 and accounting, left as it was found.

    Where it cannot be, tests that use it are left out, with a line at the end of pytest's output
    (tests/conftest.py).
    """
    if os.geteuid() != 0:
        pytest.skip(f"{sandbox.LEFT_OUT}they start a SLURM, which takes root")
    found = sandbox.options()
    up = sandbox.sandbox("up", *sandbox.STANDARD)
    if up.code == 2:
        pytest.skip(sandbox.LEFT_OUT + up.error().removeprefix("error: "))
    up.ok()
    yield
    if found is None:
        sandbox.sandbox("down", "0").ok()
    elif found != sandbox.STANDARD:
        sandbox.sandbox("up", *found).ok()
