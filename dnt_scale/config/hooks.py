"""The sections of hooks (:mod:`dnt_scale.train.hooks`) that no other part of a run asks for.

A hook of your own: its section here, a field of that name in ``RunConfig``.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from dnt_scale.config.base import ConfigError, Count, Strict, Text


def _window(text: str) -> str:
    expected = "expected FIRST..LAST, two steps of which the first is 1 or later, such as 10..12"
    if not (found := re.fullmatch(r"(\d{1,15})\.\.(\d{1,15})", text, re.ASCII)):
        raise ValueError(expected)
    first, last = int(found[1]), int(found[2])
    if not 1 <= first <= last:
        backwards = "the window ends before it begins; " if last < first else ""
        raise ValueError(f"{backwards}{expected}")
    return text


class ProfileSection(Strict):
    """``profile.*``: a window of steps to look into (:mod:`dnt_scale.train.hooks.profiler`)."""

    steps: Annotated[Text, AfterValidator(_window)] | None = Field(
        None, description="FIRST..LAST: a trace of these steps, in RUN/profile and in MLflow"
    )

    @property
    def window(self) -> range:
        """The numbers of the steps to look into; empty where none are."""
        if self.steps is None:
            return range(0)
        first, _, last = self.steps.partition("..")
        return range(int(first), int(last) + 1)


class GarbageSection(Strict):
    """``garbage.*``: when Python looks for objects that refer to each other in a circle."""

    every: Count = Field(
        100, ge=0, description="steps between collections, on all ranks; 0: as Python does"
    )


class MeasureSection(Strict):
    """``measure.*``: metrics that cost something (:mod:`dnt_scale.train.hooks.tensor_rms`)."""

    every: Count = Field(0, ge=0, description="steps between measurements of rms/*; 0: never")


class DiagnoseSection(Strict):
    """``diagnose.*``: tails of gradients, sizes of updates
    (:mod:`dnt_scale.train.hooks.diagnose`)."""

    every: Count = Field(
        0, ge=0, description="steps between lines of RUN/diagnostics.jsonl; 0: never"
    )


class TasksSection(Strict):
    """``eval.tasks.*``: tasks of lm-evaluation-harness on checkpoints
    (:mod:`dnt_scale.train.hooks.eval_tasks`)."""

    names: list[Text] = Field(
        [], description="tasks, groups or tags of the harness, or YAML files, as of `dnt lm-eval`"
    )
    every: Count = Field(
        0, ge=0, description="steps between measurements, a multiple of checkpoint.every; 0: never"
    )
    limit: Count | None = Field(
        None, gt=0, description="documents a task, at most; null: all there are"
    )


def check_window(profile: ProfileSection, total_steps: int) -> None:
    """Check that the window to look into lies within the run.

    Raises:
        ConfigError: it ends after the run's last step.
    """
    if profile.window and profile.window[-1] > total_steps:
        raise ConfigError(
            f"profile.steps: the window {profile.steps} ends after the run's last step, "
            f"{total_steps}; give steps of the run, or profile.steps=null"
        )


def is_task_file(task: str) -> bool:
    """Whether a task that was asked for is a file, rather than a name of the harness."""
    return task.endswith((".yaml", ".yml"))


def check_harness() -> None:
    """Raise ConfigError where lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "lm-evaluation-harness, which has the tasks, is not installed: "
            "pip install 'dnt-scale[eval]'"
        )


def check_tasks(tasks: TasksSection) -> None:
    """Raise ConfigError where tasks are to be measured and the harness or a file of one is not
    here.
    """
    if not tasks.every:
        return
    try:
        check_harness()
    except ConfigError as error:
        raise ConfigError(f"eval.tasks: {error}; or give eval.tasks.every=0") from None
    for task in filter(is_task_file, tasks.names):
        if not Path(task).expanduser().is_file():
            raise ConfigError(
                f"eval.tasks.names: {task}: no such file; give a task's YAML file, or the name of "
                "one that the harness has"
            )
