"""MLflow as a tracking backend. Nothing else, but `dnt ui`, knows that it exists."""

from dnt_scale.record.mlflow.backend import MLflow

BACKEND = MLflow
