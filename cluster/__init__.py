"""Keeps a training run going on SLURM: submit, requeue, status. No model code here."""
