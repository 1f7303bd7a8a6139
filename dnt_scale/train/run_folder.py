"""What a start finds in a run's folder: whether to begin, to go on from a checkpoint, or to refuse.

:func:`decide` only looks.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import yaml

from dnt_scale import checkpoint, config
from dnt_scale.checkpoint import State
from dnt_scale.checkpoint.read import complete, steps_of
from dnt_scale.checkpoint.state import step_name, step_of
from dnt_scale.checkpoint.storage import Storage
from dnt_scale.config import ConfigError, RunConfig
from dnt_scale.distributed import compute_dtype
from dnt_scale.record import timeline
from dnt_scale.record.metrics_file import METRICS, last_metrics
from dnt_scale.train import recorded

# that every config.yaml of a run has, of whatever version
SECTIONS = {"model", "optim", "data", "run", "train"}
OURS = {"step", "time"}  # that every line of metrics.jsonl has


@dataclass(frozen=True)
class Start:
    """What a start does."""

    newest: Path | str | None = None  # the checkpoint to go on from
    state: State | None = None  # its state
    dtype: str | None = None  # that the run has computed in so far
    micro_batch: int | None = None  # and the rows a forward
    notes: tuple[str, ...] = ()  # to be told, a line each
    aside: tuple[str, ...] = ()  # what of the run folder is to be moved aside first
    fresh: bool = False  # and the checkpoints
    rewound: bool = False  # and those after the one to go on from, see `--from-step`


def decide(run: RunConfig, at_most: int | None = None) -> Start:
    """What a start of ``run`` does with what is in its folder and in the folder of its checkpoints.
    Changes nothing.

    Args:
        at_most: pass over checkpoints of later steps.

    Raises:
        ConfigError: neither can it go on nor may it begin anew; names the file and what to do.
        CheckpointError: the newest checkpoint is damaged.
    """
    try:
        return _decide(run, at_most)
    except NotADirectoryError:
        raise ConfigError(
            f"run.dir: nothing can be written to {run.run.dir} (Not a directory); give another"
        ) from None
    except PermissionError as error:
        raise ConfigError(
            f"run.dir: {error.filename} cannot be read ({error.strerror}), so whether there is a "
            "run to go on with is not known; make it readable, or take another run.name"
        ) from None


def _decide(run: RunConfig, at_most: int | None) -> Start:
    run_dir = run.run.dir
    if os.path.lexists(logs := run_dir / "logs") and not logs.is_dir():
        raise ConfigError(
            f"run.dir: {logs} is no folder, which a run needs there; move it away, or "
            f"{elsewhere(run)}"
        )
    settings = settings_of(run)
    last = _last_step(run)
    place = Storage(run.checkpoints)
    notes = _strange(run, place)
    newest = _newest(run, place) if at_most is None else _before(place, at_most)
    owner = recorded.pick(settings, "run.name")
    moved = not _is_at(recorded.pick(settings, "run.dir"), run_dir)
    if owner not in (None, run.run.name) and not (moved and newest):
        raise ConfigError(
            f"run.name: {run_dir}/config.yaml is of the run {owner}, this one is {run.run.name}"
            + ("" if not moved else ", and there is no checkpoint to go on from")
            + f"; {'' if moved else f'run.name={owner} goes on with that, '}{_anew(run)}"
        )
    if newest is None:
        return _without_checkpoint(run, settings, last, notes)
    state = checkpoint.read_state(newest.path)
    name = str(newest.path).rpartition("/")[2]
    if state.step != step_of(name):
        raise ConfigError(
            f"{newest}/state.json: is of step {state.step}, so the folder is another checkpoint's "
            "copy; name it "
            f"{step_name(state.step)} or remove it to go on"
        )
    check_is_ours(run, settings, newest, state)
    if state.step > 0 and last < state.step:
        has = f"ends at step {last}" if last >= 0 else "is missing or empty"
        notes += (
            f"{run_dir / METRICS} {has}: what it had up to step {state.step} is not in it any more",
        )
    if last > state.step:
        several = last > state.step + 1
        steps = f"steps {state.step + 1} to {last}" if several else f"step {last}"
        notes += (
            f"{steps} came after the newest checkpoint and {'are' if several else 'is'} done again",
        )
    dtype, rows = (_chosen(state.config, key) for key in recorded.CHOSEN)
    return Start(newest.path, state, dtype, rows, notes)


def check_is_ours(run: RunConfig, settings: dict[str, Any], newest: Storage, state: State) -> None:
    """Raise ConfigError where checkpoint.dir holds another run's checkpoints."""
    wrote = recorded.pick(state.config, "run.name")
    if run.checkpoint.dir is None or wrote == run.run.name:
        return
    same_place = real_path(_checkpoints_of(run.run.dir, settings)) == real_path(run.checkpoints)
    if wrote == recorded.pick(settings, "run.name") and same_place:
        return
    # a folder that was renamed, and started since: its own timeline knows of this checkpoint
    if any(
        _tells_of_one(event) and event["step"] == state.step for event in timeline.read(run.run.dir)
    ):
        return
    raise ConfigError(
        f"checkpoint.dir: {newest} is of the run {wrote}, this one is {run.run.name}; give each "
        "run a place of its own, such as "
        f"checkpoint.dir='{run.checkpoint.dir.rstrip('/')}/${{run.name}}'"
    )


def _chosen(settings: Any, key: str) -> Any:
    """Return what a configuration records of a key that may be auto; None where it was not chosen
    yet.
    """
    found = recorded.pick(settings, key)
    return None if found == "auto" else found


def settings_of(run: RunConfig) -> dict[str, Any]:
    """What RUN/config.yaml says; empty where there is none. Raises ConfigError for a file that
    is not a run's.
    """
    file = run.run.dir / "config.yaml"
    try:
        text = file.read_text()
        found = yaml.safe_load(text) if text.strip("\0 \n") else {}
    except FileNotFoundError:
        if not os.path.lexists(file):
            return {}
        found = "a link to what is not there"
    except IsADirectoryError:
        found = "a folder"
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        found = "no YAML"
    if found == {} or (isinstance(found, dict) and found.keys() >= SECTIONS):
        return found
    what = (
        found if isinstance(found, str) and len(found) < 40 else "another kind of file, or damaged"
    )
    raise ConfigError(
        f"run.dir: {file} is not a run's ({what}); move it away to go on with the checkpoints "
        f"there, or {_anew(run)}"
        if complete(Storage(run.checkpoints))
        else f"run.dir: {file} is not a run's ({what}); {_anew(run)}"
    )


def _last_step(run: RunConfig) -> int:
    """The last step of RUN/metrics.jsonl; -1 where there is none. Raises ConfigError for a file
    that is not a run's.
    """
    file = run.run.dir / METRICS
    what = ""
    try:
        with file.open("rb") as lines:
            first = lines.readline(1 << 20)
        if first and not _is_ours(first):
            what = "its first line is none of training's"
    except FileNotFoundError:
        if not os.path.lexists(file):
            return -1
        what = "a link to what is not there"
    except IsADirectoryError:
        what = "a folder"
    if what:
        raise ConfigError(f"run.dir: {file} is not a run's ({what}); move it away, or {_anew(run)}")
    return max((int(line["step"]) for line in last_metrics(run.run.dir)[-1:]), default=-1)


def _is_ours(line: bytes) -> bool:
    """Whether a line of metrics.jsonl is of training, whole or as a kill cut it short."""
    try:
        found = orjson.loads(line)
    except ValueError:
        return not line.endswith(b"\n") and b'{"step":'.startswith(line[:8])
    return isinstance(found, dict) and found.keys() >= OURS and isinstance(found["step"], int)


def _strange(run: RunConfig, place: Storage) -> tuple[str, ...]:
    """A line for what has a checkpoint's name and is none. Raises ConfigError where the folder
    itself is none.
    """
    if not place.local:
        return ()
    if os.path.lexists(place.local) and not place.local.is_dir():
        link = place.local.is_symlink()
        why = (
            f"a link to {place.local.readlink()}, which is not there" if link else "Not a directory"
        )
        field = "run.dir" if run.checkpoint.dir is None else "checkpoint.dir"
        raise ConfigError(f"{field}: nothing can be written to {place.local} ({why}); give another")
    named = [name for name in place.names() if step_of(name) is not None]
    odd = {
        name: "is a file or a link, no checkpoint's folder"
        for name in named
        if not place.is_folder(name)
    }
    odd |= {name: "is empty" for name in named if name not in odd and not (place / name).names()}
    return tuple(f"{place / name} {why}: passed over" for name, why in sorted(odd.items()))


def _newest(run: RunConfig, place: Storage) -> Storage | None:
    """The newest checkpoint. Raises ConfigError where a newer one is there in part."""
    whole = complete(place)
    # at a URL state.json comes last: a killed save is no damage
    steps = (
        [step for step in steps_of(place) if (place / step_name(step)).names()]
        if place.local
        else []
    )
    newest = max(whole, default=None)
    if steps and (newest is None or steps[-1] > newest):
        part = place / step_name(steps[-1])
        then = f"remove {part} to go on from step {newest}" if newest is not None else _anew(run)
        raise ConfigError(
            f"{part}/state.json: missing, so this checkpoint is not whole; restore it, or {then}"
        )
    return None if newest is None else whole[newest]


def _before(place: Storage, at_most: int) -> Storage:
    """The newest checkpoint of at most so many steps. Raises ConfigError where there is none."""
    whole = complete(place)
    if found := [step for step in whole if step <= at_most]:
        return whole[max(found)]
    there = ", ".join(map(str, whole)) or "none at all"
    raise ConfigError(
        f"--from-step: {place} has no checkpoint of step {at_most} or before (there are: {there}); "
        "checkpoint.keep and checkpoint.keep_every say which are kept, so bring it back or leave "
        "--from-step out"
    )


def _without_checkpoint(
    run: RunConfig, settings: dict[str, Any], last: int, notes: tuple[str, ...]
) -> Start:
    """A start at step 0. Raises ConfigError where there was a checkpoint once."""
    metrics = run.run.dir / METRICS
    if why := _was_saved(run, settings, last):
        had = f"{metrics} has {last} steps" if last > 0 else f"{run.run.dir} had a checkpoint"
        raise ConfigError(
            f"run.dir: {had}, but there is no checkpoint in {run.checkpoints} ({why}); bring them "
            f"back, or {_anew(run)}"
        )
    if last < 1:
        return Start(notes=notes)
    if settings and _same(settings, run):
        return Start(
            dtype=_chosen(settings, "train.dtype"),
            micro_batch=_chosen(settings, "train.micro_batch"),
            notes=(
                *notes,
                f"no checkpoint yet: {last} step{'s' * (last > 1)} of {metrics} are done again",
            ),
        )
    why = "other settings than before" if settings else "no config.yaml"
    said = (
        f"no checkpoint yet, and {why}: the {last} step{'s' * (last > 1)} of {metrics} are not "
        "gone on with"
    )
    return Start(notes=(*notes, said), aside=("config.yaml", METRICS))


def _was_saved(run: RunConfig, settings: dict[str, Any], last: int) -> str:
    """Why a checkpoint of this run must have been in place once; empty where none need have
    been.
    """
    before = _checkpoints_of(run.run.dir, settings) if settings else run.checkpoints
    if real_path(before) != real_path(run.checkpoints) and complete(Storage(before)):
        return f"by {run.run.dir}/config.yaml they are in {before}, see checkpoint.dir"
    events = timeline.read(run.run.dir)
    if steps := [event["step"] for event in events if _tells_of_one(event)]:
        return f"that of step {max(steps)} is gone; not mounted, or checkpoint.dir has changed?"
    if last > 0 and isinstance(before, Path) and not before.is_dir():
        return f"{before} itself is gone; not mounted?"
    if isinstance(before, Path) and (before / "latest").is_symlink():
        return f"{before / 'latest'} points to one that is gone"
    every = recorded.pick(settings, "checkpoint.every") or 0
    if every and last > (2 * every if events else every):  # each is in place when the next is begun
        return f"there was one at step {every}"
    return ""


def _tells_of_one(event: timeline.Event) -> bool:
    kind, step = event["event"], event.get("step")
    return isinstance(step, int) and (
        kind == "saved"
        or (kind == "ready" and step > 0)
        or (kind == "end" and event.get("outcome") in ("FINISHED", "KILLED"))
    )


def _checkpoints_of(run_dir: Path, settings: dict[str, Any]) -> Path | str:
    """Where the run of a config.yaml in ``run_dir`` had its checkpoints."""
    chosen = recorded.pick(settings, "checkpoint.dir")
    if not isinstance(chosen, str):
        return run_dir / "checkpoints"
    return chosen if "://" in chosen else Path(chosen)


def _same(settings: dict[str, Any], run: RunConfig) -> bool:
    """Whether a config.yaml is of this very run; which has recorded there what it took for auto."""
    try:
        before = config.validate(settings)
        if run.train.dtype == "auto":
            run = compute_dtype.with_dtype(run, before.train.dtype)
        if run.train.micro_batch == "auto":
            run = run.with_micro_batch(before.train.micro_batch)
        return config.to_yaml(before) == config.to_yaml(run)
    except ConfigError:
        return False


def _is_at(written: Any, run_dir: Path) -> bool:
    """Whether a run.dir, as it was written from whatever working folder, may be this folder."""
    here = os.path.realpath(run_dir)
    parts = Path(os.path.normpath(str(written))).parts
    return os.path.realpath(str(written)) == here or (
        ".." not in parts and Path(here).parts[-len(parts) :] == parts
    )


def real_path(path: Any) -> str:
    """A path that is equal for the same place; of a URL itself."""
    return str(path) if "://" in str(path) else os.path.realpath(str(path))


def _anew(run: RunConfig) -> str:
    return f"--fresh moves what is there aside and begins anew, or {elsewhere(run)}"


def elsewhere(run: RunConfig) -> str:
    return f"take another {'run.name' if run.run.dir.name == run.run.name else 'run.dir'}"


def write_config(run: RunConfig, comment: str = "") -> None:
    """Write RUN/config.yaml, whole or not at all, and a comment in lines at its end.

    Raises:
        ConfigError: it cannot be written.
    """
    partial = run.run.dir / ".config.yaml.partial"
    try:
        run.run.dir.mkdir(parents=True, exist_ok=True)
        partial.write_text(config.to_yaml(run) + comment)
        partial.replace(run.run.dir / "config.yaml")
    except OSError as error:
        raise ConfigError(
            f"run.dir: nothing can be written to {run.run.dir} ({error.strerror or error}); give "
            "another"
        ) from None
