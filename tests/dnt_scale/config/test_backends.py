"""tracking.backends: which there are, and what is refused before anything starts."""

from pathlib import Path

import pytest

from dnt_scale import config

RUN = ["data.path=x", "run.name=r"]


def backends(*overrides: str) -> list[str]:
    return config.load([*RUN, *overrides]).tracking.backends


def test_one_or_several_are_chosen() -> None:
    assert backends() == ["mlflow"]
    assert backends("tracking=tensorboard") == ["tensorboard"]
    assert backends("tracking.backends=[tensorboard,mlflow]") == ["tensorboard", "mlflow"]
    assert backends("tracking=tensorboard", "tracking.backends=['mlflow']") == ["mlflow"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "[mlflow,tensorbord]",
            "no such backend as tensorbord; did you mean tensorboard? There are: mlflow, "
            "tensorboard",
        ),
        ("[wandb]", "no such backend as wandb. There are: mlflow, tensorboard"),
        ("[mlflow,mlflow]", "mlflow is there twice; expected each once"),
        ("[]", "expected at least one; tracking.enabled=false sends nothing"),
        ("tensorboard", "Input should be a valid list (found 'tensorboard')"),
    ],
)
def test_what_is_none_is_one_line(value: str, message: str) -> None:
    with pytest.raises(config.ConfigError) as raised:
        backends(f"tracking.backends={value}")
    assert "tracking.backends: " in str(raised.value)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_nothing_is_asked_of_a_backend_that_gets_nothing() -> None:
    assert backends("tracking.enabled=false", "tracking.backends=[wandb]") == ["wandb"]
    with pytest.raises(config.ConfigError, match=r"tracking\.uri: mlruns names a folder"):
        backends("tracking.uri=mlruns")
    assert backends("tracking=tensorboard", "tracking.uri=mlruns") == ["tensorboard"]


def test_a_run_of_an_older_dnt_goes_to_mlflow(tmp_path: Path) -> None:
    text = config.to_yaml(config.load(RUN))
    older = text.replace("  backends:\n  - mlflow\n", "")
    assert older != text
    (tmp_path / "config.yaml").write_text(older)
    assert config.from_yaml(tmp_path / "config.yaml") == config.load(RUN)
