"""Be one rank of a run: ``torchrun ... -m dnt_scale.train`` or ``srun python -m
dnt_scale.train``.
"""

import sys

from dnt_scale.train.rank import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
