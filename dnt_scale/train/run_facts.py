"""What a run tells of itself where it starts: config.yaml, and its params, tags and description."""

import os
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from dnt_scale import config
from dnt_scale.checkpoint import State
from dnt_scale.config import RunConfig
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.model.flops import count_parameters
from dnt_scale.optim.transfer import told
from dnt_scale.record.files import git_commit
from dnt_scale.record.tracker import Tracker
from dnt_scale.train.run_folder import write_config

LINE_CHARS = 90


def start_tracking(
    run: RunConfig, state: State, ranks: Ranks, scaled: Mapping[str, tuple[float, float]]
) -> Tracker:
    """Write ``config.yaml`` and open the records, going on where the checkpoint stands.

    Args:
        scaled: of `transfer.rates`: config.yaml ends with them in a comment, and the learning rates
            are params, ``learning_rate.GROUP``.

    Raises:
        ValueError: the run folder cannot be written.
        OSError: metrics.jsonl cannot.
    """
    write_config(run, f"# {told(scaled)}\n" if scaled else "")
    commit = git_commit()
    return Tracker.start(
        run.run.dir,
        backends=run.tracking.backends,
        uri=run.tracking.uri,
        experiment=run.tracking.experiment,
        run_name=run.run.name,
        run_id=state.run_id,
        params={
            **config.flat(run),
            "parameters": count_parameters(run.model),
            "ranks": ranks.world_size,
            **{f"learning_rate.{name}": now for name, (_, now) in scaled.items()},
        },
        tags={
            "git_commit": commit,
            "manifest_sha256": state.manifest_sha256,
            **{name: fact for name, fact in state.of_source.items() if isinstance(fact, str)},
            "config": config.to_yaml(run),
        },
        enabled=run.tracking.enabled,
        resume_step=state.step,
        description=description(run, ranks, commit),
    )


def description(run: RunConfig, ranks: Ranks, commit: str) -> str:
    """The text on the run's page, in Markdown: what it is, where it is, how to go on with it."""
    model, optim, train = run.model, run.optim, run.train
    budget = f"{train.steps:,} steps" if train.steps else f"{train.tokens:,} tokens"
    batch = f"{budget}, {train.global_batch:,} rows a step, {train.dtype}"
    schedule = optim.schedule
    warmup = (
        f"{100 * schedule.warmup:g} %"
        if schedule.warmup_steps is None
        else f"{schedule.warmup_steps:,} steps"
    )
    counted = "1 rank" if ranks.world_size == 1 else f"{ranks.world_size} ranks"
    sets = [
        f"{found.weight:.3g} {code(found.name)} {code(found.path)}"
        if found.name
        else code(found.path)
        for found in run.data.sets()
    ]
    stages = ", ".join(
        f"{code(name)} after {stage.beginning:,} {'steps' if stage.after_step else 'tokens'}"
        for name, stage in train.stages.items()
    )
    job = os.environ.get("SLURM_JOB_ID")
    lines = [
        f"{code(model.name)}: {count_parameters(model):,} parameters ({model.describe()})",
        "",
        f"- **optimizer**: {optim.title}, lr {optim.lr:g}, {optim.describe()}, "
        f"weight decay {optim.weight_decay:g}, "
        f"{schedule.name} schedule with {warmup} of warmup",
        f"- **budget**: {batch}",
        f"- **data**: {', '.join(sets) or f'kind {run.data.kind}'}",
        *([f"- **stages**: {stages}"] if stages else []),
        f"- **engine**: {run.engine.name} on {counted} ({ranks.device.type})",
        f"- **where**: host {code(socket.gethostname())}, folder "
        f"{code(os.path.realpath(run.run.dir))}" + (f", SLURM job {job}" if job else ""),
        f"- **code**: commit {code(commit)}",
        "",
        "To go on with it:",
        "",
        *(f"    {line}" for words in command(run, ranks) for line in shell_lines(words)),
    ]
    return "\n".join(lines) + "\n"


def code(text: object) -> str:
    """``text`` as a code span of Markdown."""
    return f"`` {text} ``" if "`" in str(text) else f"`{text}`"


def command(run: RunConfig, ranks: Ranks) -> list[list[str]]:
    """What to run in a shell to go on with a run, word by word: what has started it."""
    if (run.run.dir / "jobs" / "run.json").exists():
        return [["dnt", "resubmit", os.path.realpath(run.run.dir)]]
    words = sys.argv[2:] if sys.argv[1:2] == ["train"] else sys.argv[1:]
    overrides = [word for word in words if not (word.startswith("--") or word.isdigit())]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
        nodes = (
            "--standalone" if local == ranks.world_size else f"--nnodes={ranks.world_size // local}"
        )
        start = ["torchrun", nodes, f"--nproc-per-node={local}", "-m", "dnt_scale.train"]
    elif ranks.world_size > 1:
        start = ["srun", f"--ntasks={ranks.world_size}", "python", "-m", "dnt_scale.train"]
    else:
        start = ["dnt", "train"]
    try:
        return [["cd", str(Path.cwd())], [*start, *overrides]]
    except FileNotFoundError:  # the folder that it was started in is gone
        return [[*start, *overrides]]


def shell_lines(words: list[str]) -> list[str]:
    """A command in lines that the page has room for: longer ones would push the table of metrics
    off it.
    """
    lines = [""]
    for word in map(shlex.quote, words):
        if lines[-1] and len(lines[-1]) + len(word) > LINE_CHARS:
            lines[-1] += " \\"
            lines.append(" ")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines
