"""`dnt diagnose`: on the reference run, and its parts against what is written out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dnt_scale.cli.main import main
from dnt_scale.tools.diagnose import decile_of, histogram
from dnt_scale.train.tensor_statistics import Entries
from testbed.run import call, tensors


def diagnose_on_one_thread(arguments: list[str]) -> None:
    """`dnt diagnose`; prints the mean loss and the gradient of a few tensors, written out too."""
    from dnt_scale.config import from_yaml
    from dnt_scale.data.sources import load_source
    from dnt_scale.model.batch import IGNORED
    from dnt_scale.model.dnt import DNT, next_tokens

    assert main(arguments) == 0
    run = from_yaml(Path(arguments[1]) / "config.yaml")
    last = tensors(Path(arguments[1]) / "checkpoints" / "step-00000020")
    model = DNT(run.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(last[f"model.{name}"])
    stream = load_source(run).stream(
        seed=run.run.seed, global_batch=8, rank=0, world_size=1, consumed_rows=20 * 8
    )
    with stream:
        batch = next(stream)[0]
    inputs, targets = next_tokens(batch)
    loss = torch.nn.functional.cross_entropy(
        model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED
    )
    loss.backward()
    gradient = model.blocks[1].attn.w_k.weight.grad.double().numpy().ravel()
    print("EXPECTED", json.dumps([float(loss), list(map(float, gradient))]))


@pytest.fixture(scope="module")
def diagnosed(reference, tmp_path_factory):
    """The reference run, diagnosed on 2 micro-batches of 4 rows: output, report, plots."""
    run_dir = tmp_path_factory.mktemp("diagnosed") / "run"
    shutil.copytree(reference, run_dir, symlinks=True)
    out = call(diagnose_on_one_thread, ["diagnose", str(run_dir), "--batches", "2"]).ok().out
    return run_dir, out, json.loads((run_dir / "diagnose.json").read_text())


def test_loss_and_gradients_are_those_of_the_next_rows(diagnosed):
    _, out, report = diagnosed
    loss, gradient = json.loads(out.partition("EXPECTED ")[2])
    g = np.array(gradient)
    assert report["step"] == 20 and report["rows"] == 8
    assert report["loss"] == pytest.approx(loss, rel=1e-5)
    found = report["tensors"]["blocks.1.attn.w_k.weight"]
    assert found["rms"] == pytest.approx(np.sqrt(np.mean(g**2)), rel=1e-3)
    kurtosis = np.mean(g**4) / np.mean(g**2) ** 2
    assert found["kurtosis"] == pytest.approx(kurtosis, rel=1e-3)


def test_the_deciles_make_up_the_loss(diagnosed):
    _, _, report = diagnosed
    found = report["deciles"]
    assert sum(each["targets"] for each in found) == 8 * 64
    total = sum(each["targets"] * (each["loss"] or 0.0) for each in found)
    assert total / (8 * 64) == pytest.approx(report["loss"], rel=1e-5)
    assert sum(each["tokens"] for each in found) <= 512
    assert found[0]["tokens"] < found[-1]["tokens"] and found[0]["loss"] < found[-1]["loss"]


def test_what_is_told_and_drawn(diagnosed):
    run_dir, out, report = diagnosed
    names = {path.name for path in (run_dir / "plots").glob("diagnose-*")}
    assert names == {f"diagnose-{name}.png" for name in ("gradients", "loss", "jacobians")}
    assert all((run_dir / "plots" / name).stat().st_size > 10_000 for name in names)
    for word in ("attn.w_q", "Hill index", "10, rarest", "Prop. 5", "diagnose-loss.png"):
        assert word in out
    first, last = report["jacobians"]
    assert (first["layer"], last["layer"]) == (0, 1)
    at_token = last["tokens"][-1]
    assert at_token["smallest"] < at_token["median"] < at_token["largest"]
    assert at_token["condition"] == pytest.approx(at_token["largest"] / at_token["smallest"])
    assert last["row_largest"] > 1.0
    assert max(last["propositions"].values()) < 1e-3  # S4: all three hold


def test_several_runs_need_a_place_for_their_plots(reference, tmp_path, capsys):
    assert main(["diagnose", str(reference), str(reference)]) == 2
    assert "--out: 2 runs are to be compared" in capsys.readouterr().err
    assert main(["diagnose", str(reference), str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err  # found before the first is measured


def test_a_histogram_is_a_density_of_entries_over_their_rms():
    rng = np.random.default_rng(0)
    seen = Entries.none(2, torch.device("cpu"))
    for number, scale in enumerate((1.0, 1e-9)):
        seen.add(number, torch.from_numpy(scale * rng.standard_normal(1 << 18)))
    found = histogram(
        [(counts, each.rms) for counts, each in zip(seen.counts, seen.statistics(), strict=True)]
    )
    x, density = np.array(found["middles"]), np.array(found["density"])
    widths = x * (2 ** (1 / 16) - 2 ** (-1 / 16))
    assert (density * widths).sum() == pytest.approx(1.0, abs=1e-3)
    seen_well = (x > 0.1) & (x < 2.5)
    normal = np.sqrt(2 / np.pi) * np.exp(-(x**2) / 2)
    np.testing.assert_allclose(density[seen_well], normal[seen_well], rtol=0.1)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60))
def test_deciles_go_by_frequency_and_cut_the_text_in_tenths(counts):
    counts_V = torch.tensor(counts)
    deciles = decile_of(counts_V)
    assert int(deciles.min()) >= 0 and int(deciles.max()) <= 9
    order = counts_V.argsort(descending=True, stable=True)
    assert (deciles[order].diff() >= 0).all()  # the more frequent, the lower
    shares = torch.zeros(10, dtype=torch.int64).index_add_(0, deciles, counts_V)
    # half a token's occurrences may lie on the other side of either cut
    assert (shares <= counts_V.sum() / 10 + counts_V.max()).all()
