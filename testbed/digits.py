"""scikit-learn's handwritten digits as IDX files, for `make demo-images` where there is no
Fashion-MNIST: `python -m testbed.digits FOLDER`.
"""

import struct
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt


def write_digits(folder: Path) -> None:
    """Write 1,797 images of 8 x 8 pixels, every fifth as t10k, the others as train.

    Raises:
        ImportError: there is no scikit-learn.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    held_out = np.arange(len(digits.target)) % 5 == 0
    for name, chosen in (("train", ~held_out), ("t10k", held_out)):
        pixels = np.rint(digits.images[chosen] * 255 / 16)
        write_idx(folder / f"{name}-images-idx3-ubyte", pixels.astype(np.uint8))
        write_idx(folder / f"{name}-labels-idx1-ubyte", digits.target[chosen].astype(np.uint8))


def write_idx(path: Path, values: npt.NDArray[np.uint8]) -> None:
    """Write an array in the format of MNIST's files."""
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(head + values.tobytes())


if __name__ == "__main__":
    write_digits(Path(sys.argv[1]))
