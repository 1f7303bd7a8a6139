"""A padded vocabulary, the z-loss and the cap of logits."""

import pytest
import torch

from dnt_scale import config
from dnt_scale.distributed import device_metrics
from dnt_scale.model.batch import IGNORED
from dnt_scale.model.dnt import DNT
from dnt_scale.model.init import init_weights
from tests.helpers.models import busy, random_tokens, tiny
from tests.helpers.optimizers import new_optimizer

OPTIMIZERS = sorted(path.stem for path in (config.config_dir() / "optim").glob("*.yaml"))
PADDED = {"vocab_size": 29, "vocab_multiple": 16}


@pytest.mark.parametrize("tied", [True, False])
def test_padding_of_the_vocabulary_changes_nothing_but_shapes(tied: bool) -> None:
    plain, padded = tiny(tied_head=tied), tiny(**PADDED, tied_head=tied)
    models = [DNT(section) for section in (plain, padded)]
    for model in models:
        init_weights(model, 3)
    batch = random_tokens(plain, 2, 13)
    batch[0, 9:] = IGNORED
    losses = [model.loss_sum(batch) for model in models]
    # a product with more columns may be summed in another order
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-6)
    for loss in losses:
        loss.backward()
    tables = {"tok_emb.weight", "head.weight"} & dict(models[0].named_parameters()).keys()
    for name, ours in models[0].named_parameters():
        theirs = models[1].get_parameter(name)
        if name in tables:
            assert ours.shape[0] == 29 and theirs.shape[0] == 32
            assert not theirs[29:].any() and not theirs.grad[29:].any()
        torch.testing.assert_close(theirs.grad[: len(ours)], ours.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_padding_stays_zero_with_every_optimizer(name: str) -> None:
    model = DNT(tiny(**PADDED, tied_head=False))
    init_weights(model, 0)
    run = config.load([f"optim={name}", "run.name=x", "data.path=x"])
    optimizer = new_optimizer(model.named_parameters(), run.optim, seed=1)
    before = model.head.weight.detach().clone()
    for step in range(3):
        model.loss_sum(random_tokens(model.config, 2, 13, seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model.head.weight != before)[:29].any(dim=1).all()
    assert not model.head.weight[29:].any() and not model.tok_emb.weight[29:].any()


@torch.no_grad()
def test_padding_is_never_predicted() -> None:
    """Whatever its rows hold."""
    section = tiny(**PADDED)
    model, tokens = busy(section), random_tokens(section, 2, 12)
    before = model(tokens)
    model.tok_emb.weight[29:] *= 100
    assert before.shape[-1] == 29
    assert torch.equal(model(tokens), before)
    assert torch.equal(model(tokens, tokens), busy(section)(tokens, tokens))


def test_the_z_loss_is_the_square_of_the_log_partition_of_counted_targets() -> None:
    section = tiny(z_loss=0.01)
    model, plain = busy(section, torch.float32), busy(tiny(), torch.float32)
    batch = random_tokens(section, 2, 13)
    batch[1, 5:] = IGNORED
    device_metrics.take(torch.device("cpu"))
    found = model.loss_sum(batch)
    names, recorded = device_metrics.take(torch.device("cpu"))
    logits = plain(batch[:, :-1].clamp(min=0)).double()
    squares = logits.exp().sum(-1).log().square()[batch[:, 1:] != IGNORED]
    expected = 0.01 * squares.sum()
    cross_entropy = plain.loss_sum(batch)
    assert float(expected.detach()) > 0.1
    torch.testing.assert_close(found.double(), cross_entropy.double() + expected)
    assert names == ["train/z_loss"]
    assert recorded[0].tolist() == pytest.approx([float(expected.detach()), len(squares)])
    # perplexity is made of the cross entropy alone
    assert torch.equal(model.eval_sums(batch)["loss"], cross_entropy)


@torch.no_grad()
def test_a_cap_bounds_logits_in_fp32() -> None:
    tokens = random_tokens(tiny(), 2, 12)
    plain, capped = busy(tiny()), busy(tiny(logit_cap=0.5))
    logits = plain(tokens)
    assert logits.abs().max() > 1
    torch.testing.assert_close(capped(tokens), 0.5 * torch.tanh(logits / 0.5))
    in_bf16 = busy(tiny(logit_cap=0.5), torch.bfloat16)
    assert in_bf16(tokens).dtype == torch.bfloat16
    assert in_bf16(tokens, tokens).dtype == torch.float32
