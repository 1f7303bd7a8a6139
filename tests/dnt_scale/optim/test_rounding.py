"""How far rounding takes a run: the same steps in plain PyTorch, of one batch or of two halves.

In exact arithmetic the two are the same. Where they end apart, no engine is at fault.
"""

from pathlib import Path

import pytest

from dnt_scale import config
from dnt_scale.model.dnt import DNT
from dnt_scale.model.init import init_weights
from testbed.run import tiny
from tests.dnt_scale.optim.test_msgdw import UNBUFFERED, reference_update
from tests.helpers.engines import reference_losses

RULES = [*UNBUFFERED, "+optim.groups.out={pattern: 'w_o', update: row_adaptive, lr: 1e-3}"]
ATTENTION = ("w_q", "w_k", "norm_q", "norm_k")


def apart(corpus: Path, overrides: list[str], dtype: str) -> dict[str, float]:
    """By what share of its change in 20 steps each tensor of attention ends elsewhere."""
    run = config.load(tiny(corpus, Path("unused"), *overrides, f"train.dtype={dtype}"))
    model = DNT(run.model)
    init_weights(model, run.run.seed)
    first = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    whole, halves = (reference_losses(run, reference_update, n)[1] for n in (1, 2))
    return {
        name: float((halves[name] - weight).norm() / (weight - first[name]).norm())
        for name, weight in whole.items()
        if any(part in name for part in ATTENTION)
    }


@pytest.mark.slow
def test_bf16_takes_attention_some_percent_apart_and_fp32_nowhere(corpus: Path) -> None:
    """It goes with the dtype's rounding, which is 2^16 times as large: no engine does it."""
    exact, rough = apart(corpus, RULES, "fp32"), apart(corpus, RULES, "bf16")
    print({name: (f"{exact[name]:.1e}", f"{rough[name]:.1e}") for name in exact})
    assert max(exact.values()) < 5e-5  # found 4e-6
    assert 0.01 < max(rough.values()) < 0.1  # found 0.029
