"""``dnt lm-eval``: a run's checkpoint measured on tasks of lm-evaluation-harness.

RUN/lm_eval/STEP.json holds what was found at a step, by task; RUN/lm_eval.jsonl has a line a
measurement, which senders pass on to the run's trackers.
"""

import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data_prep.tokenizer import Tokenizer
from dnt_scale.checkpoint.state import step_name
from dnt_scale.config import ConfigError
from dnt_scale.config.hooks import check_harness
from dnt_scale.data.tokens import TokenSource
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.model.dnt import DNT
from dnt_scale.record.appended import EVALUATIONS_FOLDER, append_evaluation
from dnt_scale.record.files import read_json, write_json
from dnt_scale.tools.generate import language_run, one_set, tokenizer_file
from dnt_scale.tools.harness.tasks import load_tasks, told_of
from dnt_scale.tools.inference import checkpoint_of, load_checkpoint

SEEDS = (0, 1234, 1234)  # of random, numpy and torch, as in the harness: some tasks shuffle


class Measured(NamedTuple):
    """What was found of a task or of a group of tasks."""

    metrics: dict[
        str, float
    ]  # ``acc``, ``acc_stderr``; ``METRIC/FILTER`` where a filter has a name
    version: str
    fewshot: int | None
    documents: int
    of: int  # documents that there are


def evaluate_tasks(
    run_dir: Path,
    tasks: Sequence[str],
    ranks: Ranks,
    *,
    step: int | None,
    limit: int | None,
    batch: int | None,
    fewshot: int | None,
    include: Path | None,
    data: Path | None,
) -> tuple[int, dict[str, Measured]]:
    """Measure a checkpoint of a run; write the results into its folder, and return its step and
    them by task.

    Args:
        tasks, fewshot, include: as of ``load_tasks``.
        step: the checkpoint's; None: of the newest.
        limit: documents a task, at most.
        batch: rows that are computed at once; None: the run's ``train.micro_batch``.
        data: where the tokenizer is, if the run's data has moved.

    Raises:
        ValueError: as ``load_checkpoint`` and ``load_tasks``, or a run of another kind.
        OSError: the results cannot be written.
    """
    check_harness()
    language_run(run_dir, checkpoint_of(run_dir, step).run, data)  # before tasks are fetched
    if not os.access(run_dir, os.W_OK):
        raise ConfigError(f"{run_dir}: cannot be written, and results go there; copy the run")
    found = load_tasks(tasks, include, fewshot)
    trained = checkpoint_of(run_dir, step)  # a run that trains may have saved another
    model, source = load_checkpoint(trained, data, ranks, one_set)
    assert isinstance(source, TokenSource) and isinstance(model, DNT), "language_run has looked"
    tokenizer = Tokenizer.load(tokenizer_file(source)[0])
    measured = measure(model, tokenizer, found, limit, batch or trained.run.train.rows_a_forward)
    state = trained.state
    dtype = str(model.tok_emb.weight.dtype).removeprefix("torch.")
    keep(run_dir, state.step, {"averaged": state.averaged, "dtype": dtype}, measured)
    return state.step, measured


def measure(
    model: DNT, tokenizer: Tokenizer, tasks: dict[str, Any], limit: int | None, batch: int
) -> dict[str, Measured]:
    """Return what the harness finds of a model.

    Raises:
        ConfigError: a task wants what the model cannot do, or is broken.
    """
    from lm_eval.evaluator import evaluate

    from dnt_scale.tools.harness.language_model import RunModel, generation

    for task in tasks["tasks"].values():
        if task.get_config("output_type") == "generate_until":
            generation(task.get_config("generation_kwargs") or {}, model.config.context)
    with seeded(), told_of(", ".join(tasks["tasks"])):
        results = evaluate(RunModel(model, tokenizer, batch), tasks, limit=limit, log_samples=False)
    assert results is not None, "one process is rank 0"
    return {name: measured(name, results) for name in results["results"]}


def measured(name: str, results: dict[str, Any]) -> Measured:
    """Return a task's part of the harness's results."""
    metrics = {}
    for key, value in results["results"][name].items():
        metric, comma, chosen = key.partition(",")
        if comma and isinstance(value, int | float):
            metrics[metric if chosen == "none" else f"{metric}/{chosen}"] = float(value)
    inside = [name]
    while any(each in results["group_subtasks"] for each in inside):
        inside = [below for each in inside for below in results["group_subtasks"].get(each, [each])]
    counts = [results["n-samples"][each] for each in inside if each in results["n-samples"]]
    return Measured(
        metrics,
        str(results["versions"].get(name, "")),
        results["n-shot"].get(name),
        sum(count["effective"] for count in counts),
        sum(count["original"] for count in counts),
    )


def keep(run_dir: Path, step: int, facts: dict[str, Any], measured: dict[str, Measured]) -> None:
    """Add results to RUN/lm_eval/STEP.json, where others of the same step stay, and a line to
    RUN/lm_eval.jsonl. Raises OSError.
    """
    from importlib.metadata import version

    file = run_dir / EVALUATIONS_FOLDER / f"{step_name(step)}.json"
    file.parent.mkdir(exist_ok=True)
    now = {**facts, "time": time.time()}
    tasks = {name: {**each._asdict(), **now} for name, each in measured.items()}
    tasks = {**read_json(file).get("tasks", {}), **tasks}
    write_json(file, {"step": step, "harness": version("lm_eval"), "tasks": tasks})
    values = {
        metric_name(f"lm_eval/{name}/{metric}"): value
        for name, each in measured.items()
        for metric, value in each.metrics.items()
    }
    append_evaluation(run_dir, step, values)


def metric_name(name: str) -> str:
    """Return a name that trackers take: MLflow's are of letters, digits, and ``_-. :/``."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


@contextmanager
def seeded() -> Iterator[None]:
    """Seed the generators that the harness and its tasks draw from, which are global, and leave
    them as they were.
    """
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(SEEDS[0])
        np.random.seed(SEEDS[1])
        torch.manual_seed(SEEDS[2])
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
