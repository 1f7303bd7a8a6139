"""dnt-scale: pretrain Deeply Normalized Transformers (arXiv 2507.17501) with momentum SGD.

This package trains; ``data_prep`` makes its shards and ``cluster`` keeps it running on SLURM.
Importing it loads neither torch nor mlflow: each module imports what it uses.
"""
