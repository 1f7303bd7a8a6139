"""`dnt diagnose`: tails of gradients, loss by token frequency and Jacobians of trained runs."""

import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dnt_scale.config import ConfigError, RunConfig
from dnt_scale.data.sources import Source
from dnt_scale.data.tokens import TokenSource
from dnt_scale.distributed import process_group
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.model.batch import IGNORED, Batch, moved, split
from dnt_scale.model.block import Block
from dnt_scale.model.dnt import DNT, next_tokens
from dnt_scale.model.task import Task
from dnt_scale.record.diagnose_plots import draw
from dnt_scale.record.files import write_json
from dnt_scale.record.metrics_file import DIAGNOSTICS, whole_lines
from dnt_scale.tools.inference import Trained, checkpoint_of, load_checkpoint
from dnt_scale.tools.jacobian import (
    block_inputs,
    largest_singular_values,
    propositions,
    spectrum,
)
from dnt_scale.train.stages import load_stages
from dnt_scale.train.tensor_statistics import EDGES, FINITE, Entries, rms_of

Report = dict[str, Any]  # of what JSON is made of

DECILES = 10
SAMPLE_TOKENS = 1 << 20  # of the training rows, whose frequencies make the deciles
MOST_LAYERS = 6  # whose Jacobians are taken, evenly spread
ROW_TOKENS = 32  # at the beginning of a row, of a language model's Jacobians
AT_TOKENS = (7, 31)
HISTOGRAM_BINS = 8  # an octave of |g| / RMS
OCTAVES = (-16, 12)  # of the histogram


def diagnose_runs(
    run_dirs: Sequence[Path],
    step: int | None,
    data: Path | None,
    batches: int,
    out: Path | None,
) -> list[Path]:
    """Measure runs one after another, show what was found, write RUN/diagnose.json of each, and
    return the plots' paths.

    Args:
        step: of a checkpoint that all of them have; None: the newest of each.
        out: folder of the plots; None: RUN/plots of the one run.

    Raises:
        ValueError: several runs and no ``out``, or as ``load_checkpoint`` does.
        OSError: a file cannot be written.
    """
    if out is None and len(run_dirs) > 1:
        raise ConfigError(
            f"--out: {len(run_dirs)} runs are to be compared, but there is no folder for their "
            "plots; give one"
        )
    for run_dir in run_dirs:
        checkpoint_of(run_dir, step)  # before minutes go into the first one
    reports = []
    for run_dir in run_dirs:
        with process_group.alone() as ranks:
            # again: a run that trains may have saved another
            report = diagnose(checkpoint_of(run_dir, step), data, batches, ranks)
        show(report)
        print(f"\n{save(report, run_dir)}")
        reports.append(report)
    training = [whole_lines(run_dir / DIAGNOSTICS) for run_dir in run_dirs]
    return draw(out or run_dirs[0] / "plots", reports, training)


def diagnose(trained: Trained, data: Path | None, batches: int, ranks: Ranks) -> Report:
    """Measure a run's checkpoint on the training rows that it would see next, in fp32.

    Args:
        data: a set to read instead of the run's own.
        batches: micro-batches of ``train.micro_batch`` rows.

    Raises:
        ValueError: as ``load_checkpoint`` does.
    """
    _, run, place, state = trained
    task, source = load_checkpoint(trained, data, ranks, dtype=torch.float32, average=False)
    size, first = run.train.rows_a_forward, state.consumed_rows
    if run.train.stages and data is None:
        stage = load_stages(run).at(state.step)
        source, size, first = stage.source, stage.run.train.rows_a_forward, first - stage.first_row
    rows = read_rows(source, run, size, batches, first)
    rows = [moved(batch, ranks.device) for batch in rows]
    report: Report = {
        "run": run.run.name,
        "checkpoint": str(place),
        "step": state.step,
        "model": run.model.name,
        "setting": getattr(run.model, "setting", None),
        "rows": batches * size,
    }
    report |= gradients(task, rows)
    if isinstance(task, DNT) and isinstance(source, TokenSource):
        report["deciles"] = loss_by_frequency(task, rows, frequencies(source, run))
    report["jacobians"] = jacobians(task, split(rows[0], 1)[0])
    return report


def read_rows(source: Source, run: RunConfig, rows: int, batches: int, first: int) -> list[Batch]:
    """Return batches of so many rows each from position ``first`` of the training order on."""
    stream = source.stream(
        seed=run.run.seed, global_batch=rows, rank=0, world_size=1, consumed_rows=first
    )
    with stream:
        return [next(stream)[0] for _ in range(batches)]


# --- gradients ------------------------------------------------------------------------------------


def gradients(task: Task, batches: Sequence[Batch]) -> Report:
    """Return the mean loss, and the statistics of the gradient of each tensor.

    ``tensors`` are those of ``TensorStatistics`` by name, ``block_grad_rms`` the gradient's RMS in
    each block, ``histograms`` of |g| / RMS by kind of tensor: see `histogram`.
    """
    parameters = dict(task.named_parameters())
    targets = float(sum(int(task.count(batch)) for batch in batches))
    loss = 0.0
    for batch in batches:
        mean = task.loss_sum(batch) / targets
        mean.backward()
        loss += float(mean.detach())
    seen = Entries.none(len(parameters), torch.device("cpu"))
    for number, parameter in enumerate(parameters.values()):
        if parameter.grad is not None:
            seen.add(number, parameter.grad)
            parameter.grad = None
    found = dict(zip(parameters, seen.statistics(), strict=True))
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    blocks = [[name_of[id(p)] for p in block.parameters()] for block in task.blocks]
    inside = {name for names in blocks for name in names}
    of_kind: dict[str, list[tuple[Tensor, float]]] = defaultdict(list)
    for (name, parameter), counts in zip(parameters.items(), seen.counts, strict=True):
        if parameter.ndim >= 2:
            of_kind[kind_of(name)].append((counts, found[name].rms))
    return {
        "loss": loss,
        "tensors": {
            name: {
                **each._asdict(),
                "kind": kind_of(name),
                "matrix": parameters[name].ndim >= 2,
                "in_block": name in inside,
            }
            for name, each in found.items()
        },
        "block_grad_rms": [
            rms_of([(found[name].elements, found[name].rms) for name in names]) for names in blocks
        ],
        "histograms": {kind: histogram(parts) for kind, parts in of_kind.items()},
    }


def kind_of(name: str) -> str:
    """Return a tensor's name without the number of its block: those of all blocks are one kind."""
    return re.sub(r"^.*\.\d+\.", "", name).removesuffix(".weight")


def histogram(tensors: Sequence[tuple[Tensor, float]]) -> Report:
    """Return the density of |g| / RMS over tensors, each divided by its own RMS: in bins of 1/8
    octave from 2^-16 to 2^12, their ``middles`` and the ``density`` there.

    Args:
        tensors: counts by bins as in ``Entries``, and the RMS.
    """
    low, high = (HISTOGRAM_BINS * octave for octave in OCTAVES)
    edges = 2.0 ** (torch.arange(low, high + 1, dtype=torch.float64) / HISTOGRAM_BINS)
    total = torch.zeros(high - low, dtype=torch.float64)
    for counts, rms in tensors:
        if rms > 0:
            # counts below an edge, interpolated inside of the bins of |g|
            below = torch.cat([torch.zeros(1), counts[:FINITE].cumsum(0)]).double()
            place = torch.searchsorted(EDGES, edges * rms, right=True).clamp(1, FINITE) - 1
            share = (edges * rms - EDGES[place]) / (EDGES[place + 1] - EDGES[place])
            reached = below[place] + share.clamp(0, 1) * (below[place + 1] - below[place])
            total += reached.diff()
    everything = sum(int(counts.sum()) for counts, rms in tensors if rms > 0)
    density = total / max(1, everything) / edges.diff()
    middles = (edges[1:] * edges[:-1]).sqrt()
    return {"middles": middles.tolist(), "density": density.tolist()}


# --- loss by how frequent a token is --------------------------------------------------------------


def frequencies(source: TokenSource, run: RunConfig) -> Tensor:
    """Return how often each token is a target in a sample of the training rows: int64 (V,)."""
    rows = max(1, min(SAMPLE_TOKENS // source.unit.a_row, 4096))
    (batch,) = read_rows(source, run, rows, 1, 0)
    targets = next_tokens(batch)[1].flatten()
    return torch.bincount(targets[targets != IGNORED], minlength=source.rows.vocab_size)


def decile_of(counts_V: Tensor) -> Tensor:
    """Return the decile of each token, 0 to 9: int64 (V,).

    Tokens in the order of their frequency are cut into parts of a tenth of the occurrences each
    (Kunstner et al. 2024, arXiv 2402.19449): 0 are the few most frequent ones, 9 all the rare ones.
    A token belongs where the middle of its occurrences lies, so that a part may be empty where one
    token is more than a tenth of the text.
    """
    order_V = counts_V.argsort(descending=True, stable=True)
    ordered = counts_V[order_V].double()
    middle = (ordered.cumsum(0) - ordered / 2) / ordered.sum().clamp(min=1)
    deciles_V = torch.empty_like(order_V)
    deciles_V[order_V] = (middle * DECILES).long().clamp(max=DECILES - 1)
    deciles_V[counts_V == 0] = DECILES - 1
    return deciles_V


@torch.no_grad()
def loss_by_frequency(task: DNT, batches: Sequence[Batch], counts_V: Tensor) -> list[Report]:
    """Return of each decile: ``tokens`` in it, ``targets`` met in the batches, their mean ``loss``.

    The mean of the losses weighted by targets is the loss of the batches.
    """
    deciles_V = decile_of(counts_V)
    sums, targets = (torch.zeros(DECILES, dtype=torch.float64) for _ in range(2))
    for batch in batches:
        inputs_BT, targets_BT = next_tokens(batch)
        logits_BTV = task(inputs_BT)
        losses = F.cross_entropy(
            logits_BTV.float().flatten(0, 1),
            targets_BT.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        ).cpu()
        known = targets_BT.flatten().cpu()
        counted = known != IGNORED
        own = deciles_V[known[counted]]
        sums.index_add_(0, own, losses[counted].double())
        targets += torch.bincount(own, minlength=DECILES)
    return [
        {
            "tokens": int((deciles_V == decile).sum()),
            "targets": int(targets[decile]),
            "loss": float(sums[decile] / targets[decile]) if targets[decile] else None,
        }
        for decile in range(DECILES)
    ]


# --- Jacobians ------------------------------------------------------------------------------------


def jacobians(task: Task, row: Batch) -> list[Report]:
    """Return the spectra of some blocks' Jacobians at what they are given on one row.

    Of each block ``layer``: ``tokens``, the spectrum of output by input at single tokens;
    ``row_largest``, the largest singular value of the whole row's output by its input; and of a
    `Block` its ``propositions``. Blocks whose input is not (1, T, D) are left out.
    """
    if isinstance(task, DNT) and isinstance(row, Tensor):
        row = row[:, : ROW_TOKENS + 1]
    given = block_inputs(task, row)
    wanted = min(MOST_LAYERS, len(given))
    layers = sorted({round(each * (len(given) - 1) / max(1, wanted - 1)) for each in range(wanted)})
    found: list[Report] = []
    for layer in layers:
        block, (x, *more) = given[layer]

        def function(z: Tensor, block: Any = block, more: Sequence[Any] = more) -> Tensor:
            result: Tensor = block(z, *more)
            return result

        if not isinstance(x, Tensor) or x.ndim != 3:
            continue
        at = sorted({min(token, x.shape[1] - 1) for token in AT_TOKENS})
        each: Report = {
            "layer": layer,
            "tokens": [{"token": token, **spectrum(function, x, token)} for token in at],
            "row_largest": float(largest_singular_values(function, x)[0]),
        }
        if isinstance(block, Block):
            each["propositions"] = propositions(block, x)
        found.append(each)
    return found


# --- what is told ---------------------------------------------------------------------------------


def table_of_gradients(report: Report) -> Table:
    """Return a row a kind of matrix: the median over blocks, and in brackets the worst."""
    table = Table(box=None, pad_edge=False)
    table.add_column("gradients of", overflow="fold")
    for column in ("tensors", "kurtosis", "q99.9/q50", "Hill index", "max/RMS", "RMS"):
        table.add_column(column, justify="right", no_wrap=True)
    kinds: dict[str, list[Report]] = defaultdict(list)
    for each in report["tensors"].values():
        if each["matrix"]:
            kinds[each["kind"]].append(each)
    for kind, own in kinds.items():
        cells = [
            middle_and_worst([each[measure] for each in own], worst)
            for measure, worst in (
                ("kurtosis", max),
                ("q999_q50", max),
                ("hill", min),
                ("max_rms", max),
                ("rms", max),
            )
        ]
        table.add_row(kind, str(len(own)), *cells)
    return table


def table_of_jacobians(report: Report) -> Table:
    """Return a row a block: its spectrum at the last token, and what the propositions say."""
    table = Table(box=None, pad_edge=False)
    columns = ["largest", "median", "smallest", "condition", "largest, row"]
    columns += ["Prop. 5", "Prop. 2 attention", "Prop. 2 FFN"]
    for column in ("block", *columns):
        table.add_column(column, justify="right", no_wrap=True)
    for each in report["jacobians"]:
        last = each["tokens"][-1]
        values = [last[name] for name in ("largest", "median", "smallest", "condition")]
        values += [each["row_largest"], *each.get("propositions", {}).values()]
        cells = ["-" if value is None else f"{value:.3g}" for value in values]
        table.add_row(str(each["layer"]), *cells)
    return table


def table_of_deciles(report: Report) -> Table:
    """Return a row a tenth of the text, by how frequent its tokens are."""
    table = Table(box=None, pad_edge=False)
    for column in ("tenth of the text", "tokens in it", "targets", "loss"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, each in enumerate(report["deciles"], start=1):
        name = {1: "1, most frequent", DECILES: f"{DECILES}, rarest"}.get(number, str(number))
        loss = "-" if each["loss"] is None else f"{each['loss']:.3f}"
        table.add_row(name, f"{each['tokens']:,}", f"{each['targets']:,}", loss)
    return table


def show(report: Report) -> None:
    """Print a report's tables."""
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(
        f"{report['run']}: {report['checkpoint']}, loss {report['loss']:.4f} on {report['rows']} "
        f"training rows; gradient RMS of blocks spreads by {spread(report):.3g}",
        soft_wrap=True,
    )
    tables = [table_of_gradients(report)]
    tables += [table_of_deciles(report)] if report.get("deciles") else []
    tables += [table_of_jacobians(report)] if report["jacobians"] else []
    for table in tables:
        console.print()
        console.print(table)


def spread(report: Report) -> float:
    """Return the largest over the smallest gradient RMS of blocks; nan where one is 0."""
    known = [value for value in report["block_grad_rms"] if math.isfinite(value)]
    return max(known) / min(known) if known and min(known) > 0 else math.nan


def middle_and_worst(values: Sequence[float], worst: Any = max) -> str:
    """Say the median, and where there are several the worst."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "-"
    middle = f"{statistics.median(known):.3g}"
    return middle if len(values) == 1 else f"{middle} ({worst(known):.3g})"


def save(report: Report, run_dir: Path) -> Path:
    """Write RUN/diagnose.json and return its path; what is not finite is null.

    Raises:
        OSError: it cannot be written.
    """
    path = run_dir / "diagnose.json"
    write_json(path, report)
    return path
