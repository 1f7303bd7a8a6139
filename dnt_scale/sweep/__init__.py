"""Sweeps: runs that differ in some values, in a folder of their own, trained here one after the
other (:mod:`dnt_scale.sweep.here`) or on SLURM as an array (:mod:`cluster.submit.sweep_run`)."""
