"""The harness's tasks that were asked for: names, and files of tasks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dnt_scale.config import ConfigError
from dnt_scale.config.base import nearest
from dnt_scale.config.hooks import is_task_file
from dnt_scale.distributed.errors import out_of_memory
from dnt_scale.record.files import reason

FEWSHOT_SEED = 1234  # the harness's own default: the same examples as elsewhere


def load_tasks(wanted: Sequence[str], include: Path | None, fewshot: int | None) -> dict[str, Any]:
    """Return the harness's tasks and groups of them, their data loaded.

    Args:
        wanted: names of tasks, groups or tags, or paths of YAML files.
        include: a folder of YAML files, whose names are known then too.
        fewshot: examples in front of each question, where a task does not insist on none; None: as
            each task says.

    Raises:
        ConfigError: no such task or file, or its data cannot be had.
    """
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise ConfigError(f"--include: {include}: no such folder; give one of YAML files of tasks")
    for each in filter(is_task_file, wanted):
        if not Path(each).expanduser().is_file():
            raise ConfigError(f"--tasks: {each}: no such file")
    names = [each for each in wanted if not is_task_file(each)]
    manager = TaskManager(include_path=include and str(include), include_defaults=False)
    if not all(name in manager.task_index for name in names):
        manager = TaskManager(include_path=include and str(include))  # seconds: thousands of files
    for name in names:
        if name not in manager.task_index:
            near = nearest(name, manager.all_tasks)
            hint = f"did you mean {near}?" if near else "`lm-eval ls tasks` lists those that it has"
            raise ConfigError(f"--tasks: {name!r} is no task, group or tag of the harness; {hint}")
    with told_of(", ".join(wanted)):
        loaded: dict[str, Any] = dict(manager.load(list(wanted)))
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if fewshot is not None and own != 0:
                task.set_config(key="num_fewshot", value=fewshot)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


@contextmanager
def told_of(tasks: str) -> Iterator[None]:
    """Raise ConfigError for whatever a task's files and data make the harness raise, and where
    memory is too small for a batch.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise ConfigError(
                f"--batch: {reason(error)}; give a smaller one than it was, or a machine with more "
                "memory"
            ) from error
        raise ConfigError(
            f"--tasks: {tasks}: {reason(error)}; check the task's file, and whether its data can "
            "be had from here"
        ) from error
