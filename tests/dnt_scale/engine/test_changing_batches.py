"""Engines take a batch of other rows, row lengths and micro-batches at any step, as stages of a run
give them.
"""

import json
from pathlib import Path

import pytest
import torch

from dnt_scale import engine
from dnt_scale.distributed import process_group
from dnt_scale.model.dnt import DNT
from testbed.configs import composed
from testbed.run import call, tiny

ENGINES = {
    "fsdp": ["engine=fsdp"],
    "in backward": ["engine=fsdp", "optim.gradient_buffer=false", "optim.clip_norm=null"],
    "zero1": ["engine=zero1"],
    "zero1+offload": ["engine=zero1", "engine.offload_optimizer=true"],
    "zero3": ["engine=zero3"],
}
# (rows, tokens a row, rows of a micro-batch): on 2 ranks 1, 3, 2 and 1 micro-batches
BATCHES = [(8, 65, 4), (24, 65, 4), (8, 33, 2), (4, 33, 2)]


def train_with_changing_batches(data: Path, out: Path) -> None:
    me = process_group.start("cpu")
    losses: dict[str, list[float]] = {}
    for label, chosen in ENGINES.items():
        run = composed(
            *tiny(data, Path("unused"), *chosen, "optim.weight_decay=0"),
            "train.stages.large.after_step=1",
            "train.stages.large.global_batch=24",
        )
        built = engine.build(run, lambda run=run: DNT(run.model), me, 20)
        losses[label] = []
        for step, (rows, length, micro_batch) in enumerate(BATCHES):
            tokens = torch.randint(
                0, 16, (rows, length), generator=torch.Generator().manual_seed(step)
            )
            built.micro_batch = micro_batch
            stats = built.train_step(tokens.chunk(2)[me.rank], lambda loss, norm: 1.0)
            losses[label].append(stats.loss)
        built.close()
    if me.first:
        out.write_text(json.dumps(losses))
    process_group.stop()


@pytest.mark.slow
def test_engines_agree_on_changing_batches(tmp_path):
    call(train_with_changing_batches, tmp_path, tmp_path / "losses.json", ranks=2).ok()
    losses = json.loads((tmp_path / "losses.json").read_text())
    wanted = losses.pop("fsdp")
    assert len(set(wanted)) == len(BATCHES)
    for label, found in losses.items():
        assert found == pytest.approx(wanted, abs=1e-5, rel=0), label
