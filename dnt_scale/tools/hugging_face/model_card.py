"""README.md of an exported model: what the run was, read off its folder and its checkpoint."""

import math
from contextlib import suppress
from pathlib import Path

from dnt_scale.checkpoint import State
from dnt_scale.config import RunConfig
from dnt_scale.model.flops import count_parameters
from dnt_scale.record.files import read_json
from dnt_scale.record.metrics_file import METRICS, whole_lines
from dnt_scale.record.sender_files import order_file

LOSSES = ("train/loss", "val/loss", "val/perplexity", "val/bits_per_byte")


def card(run: RunConfig, run_dir: Path, state: State, dtype: str, code: bool) -> str:
    """Return the text.

    Args:
        dtype: of the weights in the folder.
        code: whether the model is of a class in the folder.
    """
    trust = ", trust_remote_code=True" if code else ""
    sets = [found.path.name for found in run.data.sets()]
    budget = {name: value for name, value in state.of_source.items() if isinstance(value, int)}
    hashes = {name: value for name, value in state.of_source.items() if isinstance(value, str)}
    facts = {
        "model": f"{run.model.name}: {count_parameters(run.model):,} parameters, "
        f"{run.model.describe()}",
        "weights": f"{'moving average (train.ema)' if state.averaged else 'as trained'}, {dtype}",
        "trained": f"{state.step:,} steps of {run.train.global_batch:,} rows"
        + "".join(f", {value:,} {name}" for name, value in budget.items()),
        **losses(run_dir, state.step),
        "data": f"{', '.join(sets)}; manifest sha256 {state.manifest_sha256}",
        **{name.replace("_sha256", " sha256"): value for name, value in hashes.items()},
        "optimizer": f"{run.optim.algorithm}, learning rate {run.optim.lr:g}, "
        f"{run.optim.describe()}, weight decay {run.optim.weight_decay:g}, "
        f"{run.optim.schedule.name} schedule",
        "compute dtype": run.train.dtype,
        "seed": str(state.seed),
        "run id": state.run_id,
        "code": f"dnt-scale{commit(run_dir)}",
    }
    rows = [f"| {name} | {text} |" for name, text in facts.items()]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "---",
            "",
            f"# {run.run.name}",
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
