"""dnt-scale: pretrain Deeply Normalized Transformers (arXiv 2507.17501) with momentum SGD.

This package trains; ``data_prep`` makes its shards and ``cluster`` keeps it running on SLURM.
Importing it loads neither torch nor mlflow: each module imports what it uses.
"""

import sys

if sys.argv[:1] == ["-m"]:  # python -m dnt_scale.train, before anything else is imported
    from dnt_scale.startup import leave_folder_out, let_threads_sleep

    leave_folder_out()
    let_threads_sleep()
