"""README.md of an exported model: what the run was, read off its folder and its checkpoint."""

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from dnt_scale.checkpoint import State
from dnt_scale.config import DataSection, RunConfig, by_stage
from dnt_scale.model.flops import count_parameters
from dnt_scale.record.files import read_json
from dnt_scale.record.metrics_file import METRICS, whole_lines
from dnt_scale.record.sender_files import order_file
from dnt_scale.tools.hugging_face.architectures import Architecture

LOSSES = ("train/loss", "val/loss", "val/perplexity", "val/bits_per_byte")
BAR = "&#124;"  # a bar in a cell of a table
WHAT: dict[Architecture, str] = {
    "gpt2": "Its architecture is GPT-2's.",
    "llama": "Its architecture is Llama's.",
    "dnt": "Its architecture is the Deeply Normalized Transformer's "
    "([arXiv 2507.17501](https://arxiv.org/abs/2507.17501)), in the setting below: its code is in "
    "this folder.",
}


def card(run: RunConfig, run_dir: Path, state: State, dtype: str, kind: Architecture) -> str:
    """Return the text.

    Args:
        dtype: of the weights in the folder.
        kind: what the model is to transformers.
    """
    trust = ", trust_remote_code=True" if kind == "dnt" else ""
    budget = {name: value for name, value in state.of_source.items() if isinstance(value, int)}
    begun = stages(run, state)
    batch = f" of {run.train.global_batch:,} rows" if len(begun) == 1 else ""
    hashes = {name: value for name, value in state.of_source.items() if isinstance(value, str)}
    facts = {
        "model": f"{run.model.name}: {count_parameters(run.model):,} parameters, "
        f"{run.model.describe()}",
        "weights": f"{'moving average (train.ema)' if state.averaged else 'as trained'}, {dtype}",
        "trained": f"{state.step:,} steps{batch}"
        + "".join(f", {value:,} {name}" for name, value in budget.items()),
        **losses(run_dir, state.step),
        **begun,
        **documents(run),
        **{name.replace("_sha256", " sha256"): value for name, value in hashes.items()},
        "optimizer": f"{run.optim.title}, learning rate {run.optim.lr:g}, "
        f"{run.optim.describe()}, weight decay {run.optim.weight_decay:g}, "
        f"{run.optim.schedule.name} schedule",
        "compute dtype": run.train.dtype,
        "seed": str(state.seed),
        "run id": state.run_id,
        "code": f"dnt-scale{commit(run_dir)}",
    }
    rows = [f"| {name} | {text.replace('|', BAR)} |" for name, text in facts.items()]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "---",
            "",
            f"# {run.run.name}",
            "",
            f"A language model that dnt-scale has pretrained. {WHAT[kind]}",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("."{trust})',
            f'tokenizer = AutoTokenizer.from_pretrained("."{trust})',
            'inputs = tokenizer("Once", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
            "```",
            "",
            "A text begins with the end-of-document token, as rows of training do; the tokenizer "
            "puts it there.",
            "",
        ]
    )


def stages(run: RunConfig, state: State) -> dict[str, str]:
    """Return the data of each stage that has begun, by where it began; with their batches where
    there is more than one.
    """
    hashes = state.sets or {"": state.manifest_sha256}  # of old: not by name
    found = {"data": sets(run.data, hashes)}
    before = run
    for name, now in list(by_stage(run).items())[1:]:
        stage = run.train.stages[name]
        unit = "steps" if stage.after_step else "tokens"
        done = state.step if stage.after_step else state.of_source.get(unit, 0)
        if not isinstance(done, int) or done <= stage.beginning:
            break
        what = [f"{now.train.global_batch:,} rows a step"]
        if now.data != before.data:
            what.append(sets(now.data, state.stages.get(name, {})))
        found[f"after {stage.beginning:,} {unit}"] = "; ".join(what)
        before = now
    if before is not run:
        found["data"] = f"{run.train.global_batch:,} rows a step; {found['data']}"
    return found


def documents(run: RunConfig) -> dict[str, str]:
    """Return what to mind where attention stayed inside documents, which the folder's model does
    not see to.
    """
    if not getattr(run.data, "document_mask", False):
        return {}
    return {
        "documents": "attention stayed inside each (data.document_mask): give the model one at a "
        "time"
    }


def sets(data: DataSection, hashes: Mapping[str, str]) -> str:
    """Return a section's sets with their weights and the SHA-256 of their manifests, by name."""
    return ", ".join(
        (f"{found.weight:.3g} " if found.name else "")
        + found.path.name
        + (f" (manifest sha256 {hashes[found.name]})" if found.name in hashes else "")
        for found in data.sets()
    )


def losses(run_dir: Path, step: int) -> dict[str, str]:
    """Return the newest of each loss up to a step, by its name."""
    found: dict[str, str] = {}
    for line in whole_lines(run_dir / METRICS):
        if line["step"] <= step:
            for name in LOSSES:
                if isinstance(value := line.get(name), float) and math.isfinite(value):
                    found[name] = f"{value:.4f} at step {line['step']:,}"
    return found


def commit(run_dir: Path) -> str:
    """Return ``, commit ...`` of the code that the run's last start was of; empty where no tracker
    and no submission has it on record.
    """
    tags = read_json(order_file(run_dir)).get("tags")
    found = tags.get("git_commit") if isinstance(tags, dict) else None
    if found is None:
        with suppress(OSError):
            found = (run_dir / "jobs" / "code" / "COMMIT").read_text().strip()
    return f", commit {found}" if found not in (None, "unknown") else ""
