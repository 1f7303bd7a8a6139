"""Tokens a second of `dnt generate`: with the cache of keys and values, and without it.

    python -m benchmarks.generation

Weights are random, in fp32; texts have --context tokens when measuring begins. "no cache"
reads one text anew for each token, as `dnt generate` did at first; "transformers" is the class that
`dnt export` puts beside such weights, with its own cache, by its own `generate`, of one text. They
take turns, on one thread; processor seconds are those of the process, so other work on the machine
changes little. Sampling is greedy.
"""

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from dnt_scale.config import ModelConfig, config_dir
from dnt_scale.model.dnt import DNT
from dnt_scale.model.init import init_weights
from dnt_scale.record.files import git_commit
from dnt_scale.tools.hugging_face.architectures import settings_of
from dnt_scale.tools.hugging_face.remote_code.configuration_dnt import DNTConfig
from dnt_scale.tools.hugging_face.remote_code.modeling_dnt import DNTForCausalLM

WANTED_RATIO = 10.0  # to the way without a cache
WITHOUT, CACHE, THEIRS = "no cache", "cache", "transformers"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["dnt_nano", "dnt_124m"])
    parser.add_argument("--context", type=int, default=512, help="tokens that are there before")
    parser.add_argument("--tokens", type=int, default=32, help="tokens a measurement with a cache")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8], help="texts at once, with the cache"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON to write (default: benchmarks/results/generation-DEVICE.json)",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "device": f"{os.cpu_count()}-core CPU",
        "torch": torch.__version__,
        "context": options.context,
        "wanted_ratio": WANTED_RATIO,
        "measured": [
            measured(name, batch, options) for name in options.models for batch in options.batches
        ],
    }
    show(result)
    device = result["device"].replace(" ", "-")
    out = options.out or Path(__file__).parent / "results" / f"generation-{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}")


@torch.inference_mode()
def measured(name: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return tokens by processor second and by second of each way, of all its texts together:
    medians over the rounds.
    """
    section = yaml.safe_load((config_dir() / "model" / f"{name}.yaml").read_text())
    config = ModelConfig.model_validate(
        section | {"context": max(section["context"], options.context + options.tokens)}
    )
    model = DNT(config)
    init_weights(model, 0)
    theirs = DNTForCausalLM(DNTConfig(**settings_of(config, "dnt"))).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    torch.manual_seed(0)
    text = torch.randint(0, config.vocab_size, (options.context,)).tolist()
    ways: dict[str, Callable[[], tuple[int, float, float]]] = {
        WITHOUT: lambda: without_cache(model, text),
        CACHE: lambda: with_cache(model, text, batch, options.tokens),
        THEIRS: lambda: by_transformers(theirs, text, options.tokens),
    }
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(options.rounds + 1):
        for way, run in ways.items():
            tokens, processor_s, seconds = run()
            if number:  # the first warms up
                found[way].append((tokens / processor_s, tokens / seconds))
    by_processor, by_clock = (
        {way: statistics.median(each[place] for each in rounds) for way, rounds in found.items()}
        for place in (0, 1)
    )
    return {
        "model": name,
        "width": config.width,
        "layers": config.layers,
        "batch": batch,
        "tokens_per_processor_s": by_processor,
        "tokens_per_s": by_clock,
        "ratio": by_processor[CACHE] / by_processor[WITHOUT],
    }


def timed(work: Callable[[], int]) -> tuple[int, float, float]:
    """Return what a call returns, its processor seconds and its seconds."""
    processor, clock = time.process_time(), time.perf_counter()
    tokens = work()
    return tokens, time.process_time() - processor, time.perf_counter() - clock


def without_cache(model: DNT, text: list[int]) -> tuple[int, float, float]:
    """Time one token, by the logits of all that are there."""

    def work() -> int:
        model(torch.tensor([text]))[0, -1].argmax().item()
        return 1

    return timed(work)


def with_cache(model: DNT, text: list[int], batch: int, tokens: int) -> tuple[int, float, float]:
    """Time ``tokens`` tokens of each of several texts, which are in the cache already."""
    cache = model.new_cache(batch, len(text) + tokens)
    model.fill(cache, [0], [text[:-1]])
    for row in range(1, batch):
        cache.move(0, row)

    def work() -> int:
        last = [text[-1]] * batch
        for _ in range(tokens):
            last = model.next_logits(cache, last).argmax(-1).tolist()
        return tokens * batch

    return timed(work)


def by_transformers(
    model: PreTrainedModel, text: list[int], tokens: int
) -> tuple[int, float, float]:
    """Time as much of transformers: a call for ``tokens`` tokens, less one for the first."""

    def work(count: int) -> int:
        model.generate(
            torch.tensor([text]),
            attention_mask=torch.ones(1, len(text), dtype=torch.int64),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return count

    whole, first = timed(lambda: work(tokens)), timed(lambda: work(1))
    return whole[0] - first[0], whole[1] - first[1], whole[2] - first[2]


def show(result: dict[str, Any]) -> None:
    table = Table(
        title=f"tokens a processor second at {result['context']} tokens, fp32, all texts together"
    )
    for header in ("model", "texts", WITHOUT, CACHE, "times", "wanted", THEIRS):
        table.add_column(header, justify="left" if header == "model" else "right")
    for each in result["measured"]:
        rates = each["tokens_per_processor_s"]
        table.add_row(
            each["model"],
            f"{each['batch']}",
            f"{rates[WITHOUT]:,.2f}",
            f"{rates[CACHE]:,.1f}",
            f"{each['ratio']:.1f}",
            f"{result['wanted_ratio']:.0f}",
            f"{rates[THEIRS]:,.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
