"""`dnt checkpoint`: what its commands print, write and exit with."""

import json
import re
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dnt_scale.checkpoint import Saver, inspection, read_state
from dnt_scale.checkpoint.inspection import buffer_problems
from dnt_scale.checkpoint.storage import Storage
from dnt_scale.checkpoint.write import publish, write_file
from dnt_scale.cli.main import main
from dnt_scale.distributed import process_group
from dnt_scale.distributed.process_group import Ranks
from testbed.run import tensors, tiny
from tests.helpers.tensor_shards import equal, flat, save_made_up, some_state, some_tensors


@pytest.fixture(scope="module")
def me() -> Iterator[Ranks]:
    with process_group.alone() as me:
        yield me


def write(
    folder: Path, whole: dict[str, torch.Tensor], me: Ranks, step: int = 7, **changes: object
) -> Path:
    """A checkpoint as 3 ranks of ZeRO would leave it."""
    final = Storage(folder) / f"step-{step:08d}"
    partial = Storage(folder) / "partial"
    partial.make()
    records = {}
    for rank in range(3):
        for file in Saver(folder, replace(me, rank=rank), keep=1).stage(flat(whole, rank, 3)):
            records[file.name] = write_file(partial, file.name, file.chunks())
    publish(partial, final, some_state(step, 3, files=records, **changes))
    assert final.local
    return final.local


def test_inspect_tells_what_a_checkpoint_is(me, tmp_path, capsys):
    write(tmp_path / "run" / "checkpoints", some_tensors(), me, 6)
    step = write(tmp_path / "run" / "checkpoints", some_tensors(), me, 7, skipped=2)
    for path in (step, step.parent, tmp_path / "run", f"file://{tmp_path}/run"):
        assert main(["checkpoint", "inspect", str(path)]) == 0
        out = capsys.readouterr().out
        for line in (
            "step           7, 2 of them skipped",
            "tokens         3,584",
            "data position  row 56 of the order of seed 1234",
            "parameters     1,684 in 3 tensors",
            "written by     engine fsdp on 3 ranks",
            "engine         step 7, updates 7",
        ):
            assert line in out.splitlines()
        assert ("also there     step-00000006" in out) == (path != step)


def test_inspect_reads_tensors_when_asked(me, tmp_path, capsys):
    whole = some_tensors()
    whole["model.norm.gain"][3] = float("nan")
    step = write(tmp_path, whole, me)
    assert main(["checkpoint", "inspect", str(step), "--tensors"]) == 0
    lines = {
        line.split()[0]: line.split()[1:]
        for line in capsys.readouterr().out.splitlines()
        if "." in line
    }
    weight = whole["model.emb.weight"]
    numbers = [
        f"{float(value):.6g}" for value in (weight.double().norm(), weight.min(), weight.max())
    ]
    assert lines["model.emb.weight"][:5] == ["50", "x", "33", "float32", "2"]
    assert lines["model.emb.weight"][5:] == numbers
    assert lines["momentum_buffer.emb.weight"][3] == "bfloat16"
    assert lines["model.norm.gain"][-3:] == ["nan", "nan", "nan"]


def test_a_run_whose_checkpoints_lie_elsewhere_is_found(me, corpus, tmp_path, capsys):
    from dnt_scale import config

    run = config.load(tiny(corpus, tmp_path / "run", f"checkpoint.dir={tmp_path}/elsewhere"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml(run))
    write(tmp_path / "elsewhere", some_tensors(), me)
    assert main(["checkpoint", "inspect", str(tmp_path / "run")]) == 0
    assert f"checkpoint     {tmp_path}/elsewhere/step-00000007" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["diff", "."], ["convert"]])
def test_no_checkpoint_is_told(command, tmp_path, capsys):
    arguments = [*command, str(tmp_path), *(["out.safetensors"] if command == ["convert"] else [])]
    assert main(["checkpoint", *arguments]) == 2
    assert (
        "no checkpoint there; expected a run's folder, its checkpoints/, or a step-NNNNNNNN"
        in capsys.readouterr().err
    )


def test_verify_says_whole_or_what_is_not(me, tmp_path, capsys):
    save_made_up(tmp_path, 1, me)
    step = write(tmp_path, some_tensors(), me)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/step-00000001: whole\n{step}: whole\n"
    # each file is what state.json says, but they do not make up the tensors
    lost = sorted(step.glob("*.safetensors"))[-1]
    state = json.loads((step / "state.json").read_text())
    lost.unlink()
    del state["files"][lost.name]
    (step / "state.json").write_text(json.dumps(state))
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/step-00000001: whole\n"
    assert f"error: {step}: no momentum_buffer.temperature" in err.splitlines()
    assert "momentum_buffer.emb.weight has shape" in err
    assert main(["checkpoint", "verify", str(tmp_path / "step-00000001")]) == 0


PLAIN = {"model.a": (3, 2), "model.b": (2,), "momentum_buffer.a": (3, 2), "momentum_buffer.b": (2,)}
OWN = {"optim": {"groups": {"gains": {"pattern": "b", "optimizer": {"algorithm": "adamw"}}}}}


@pytest.mark.parametrize(
    ("settings", "changes", "problems"),
    [
        ({}, {}, []),
        ({}, {"row_square.a": (3,)}, []),  # a number a row, of some weights only
        ({}, {"exp_avg.a": (3, 2)}, ["no exp_avg.b"]),
        ({}, {"momentum_buffer.b": None}, ["no momentum_buffer.b"]),
        ({}, {"momentum_buffer.a": (3,)}, ["momentum_buffer.a has shape (3,), its weight (3, 2)"]),
        ({}, {"model.b": None}, ["no model.b"]),
        (OWN, {"momentum_buffer.b": None, "exp_avg.b": (2,)}, []),
        (OWN, {"momentum_buffer.b": None}, ["no buffer of model.b"]),
    ],
)
def test_every_weight_has_the_buffers_of_its_optimizer(settings, changes, problems):
    shapes = {name: shape for name, shape in (PLAIN | changes).items() if shape is not None}
    state = some_state(1).model_copy(update={"config": settings})
    assert buffer_problems(shapes, state) == problems


@pytest.mark.parametrize("path", ["", "/latest"])
def test_a_latest_that_was_removed_by_hand_means_the_newest_that_is_there(
    me, tmp_path, capsys, path
):
    save_made_up(tmp_path, 1, me)
    save_made_up(tmp_path, 2, me)
    shutil.rmtree(write(tmp_path, some_tensors(), me))
    for command, said in (
        ("inspect", f"checkpoint     {tmp_path}/step-00000002\n"),
        ("verify", "step-00000002: whole\n"),
    ):
        assert main(["checkpoint", command, f"{tmp_path}{path}"]) == 0
        out, err = capsys.readouterr()
        assert said in out
        gone = (
            f"{tmp_path}/latest: step-00000007 is gone; the newest that is there is "
            f"{tmp_path}/step-00000002\n"
        )
        assert err == gone
    assert ("step-00000001" in out) == (path == "")
    save_made_up(tmp_path, 3, me)
    assert (tmp_path / "latest").resolve().name == "step-00000003"


def test_diff_of_the_same_tensors_cut_otherwise_is_none(me, tmp_path, capsys):
    save_made_up(tmp_path / "a", 7, me)
    write(tmp_path / "b", some_tensors(), me)
    assert main(["checkpoint", "diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == "tensors: bitwise equal\n"


def test_diff_names_the_first_place_and_the_worst_tensors(me, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inspection, "CHUNK", 1000)
    whole = some_tensors()
    write(tmp_path / "a", whole, me)
    other = {name: tensor.clone() for name, tensor in whole.items()}
    other["model.emb.weight"][41, 5] += 0.5
    other["model.emb.weight"][49, 0] += 0.25
    other["momentum_buffer.norm.gain"][2] = float("nan")
    write(tmp_path / "b", other, me, tokens=1)
    assert main(["checkpoint", "diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    lines = capsys.readouterr().out.splitlines()
    a, b = (t["model.emb.weight"][41, 5].item() for t in (whole, other))
    assert lines[0] == "tokens: 3584 and 1"
    assert lines[1] == f"first: model.emb.weight[41, 5]: {a!r} and {b!r}, 0.5 apart"
    assert lines[2] == "tensors that differ: 2"
    assert lines[4].split() == ["momentum_buffer.norm.gain", "inf", "inf", "1", "of", "33", "[2]"]
    assert lines[5].split()[:5] == [
        "model.emb.weight",
        "0.5",
        f"{0.3125**0.5 / whole['model.emb.weight'].norm().item():.3g}",
        "2",
        "of",
    ]


def test_diff_sees_the_sign_of_zero_and_what_is_missing(me, tmp_path, capsys):
    write(
        tmp_path / "a",
        {"model.x": torch.zeros(3), "model.y": torch.ones(2), "momentum_buffer.x": torch.zeros(3)},
        me,
    )
    b = {"model.x": -torch.zeros(3), "model.y": torch.ones(1, 2), "exp_avg.x": torch.zeros(3)}
    write(tmp_path / "b", b, me)
    assert main(["checkpoint", "diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    out = capsys.readouterr().out
    assert "first: model.x[0]: 0.0 and -0.0, 0 apart" in out
    assert (
        f"model.y: (2,) in {tmp_path}/a/step-00000007, (1, 2) in {tmp_path}/b/step-00000007" in out
    )
    assert f"momentum_buffer.x: only in {tmp_path}/a/step-00000007" in out
    assert f"exp_avg.x: only in {tmp_path}/b/step-00000007" in out


def test_convert_writes_weights_or_all(me, tmp_path, capsys):
    whole = some_tensors(scale=40)
    write(tmp_path / "run" / "checkpoints", whole, me)
    weights, everything = tmp_path / "w.safetensors", tmp_path / "all.safetensors"
    assert main(["checkpoint", "convert", str(tmp_path / "run"), str(weights)]) == 0
    assert main(["checkpoint", "convert", str(tmp_path / "run"), str(everything), "--full"]) == 0
    plain = {
        name.removeprefix("model."): t for name, t in whole.items() if name.startswith("model.")
    }
    assert equal(load_file(weights), plain)
    assert equal(load_file(everything), whole)
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    assert (
        metadata["format"] == "pt"
        and metadata["step"] == "7"
        and json.loads(metadata["model"]) == {"width": 33}
    )
    assert (
        f"{weights}: 3 tensors of step 7, {weights.stat().st_size:,} bytes"
        in capsys.readouterr().out
    )


def test_convert_leaves_the_file_that_was_there_when_it_fails(me, tmp_path, capsys):
    write(tmp_path / "run", some_tensors(scale=40), me)
    out = tmp_path / "w.safetensors"
    out.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        assert main(["checkpoint", "convert", str(tmp_path / "run"), str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in capsys.readouterr().err
    assert out.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "w.safetensors"]


@pytest.fixture(scope="module")
def nano_weights() -> dict[str, torch.Tensor]:
    from dnt_scale import config
    from dnt_scale.model.dnt import DNT

    run = config.load(tiny(Path("unused"), Path("unused")))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in DNT(run.model).named_parameters()}
    generator = torch.Generator().manual_seed(5)
    return {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("optim", ["msgdw_r", "adamw"])
def test_convert_makes_the_first_checkpoint_of_a_run(corpus, tmp_path, capsys, nano_weights, optim):
    file = tmp_path / "w.safetensors"
    save_file(
        {name: t.bfloat16() if "gain" in name else t for name, t in nano_weights.items()}, file
    )
    overrides = tiny(corpus, tmp_path / "run", f"optim={optim}")
    assert main(["checkpoint", "convert", str(file), *overrides]) == 0
    step = tmp_path / "run" / "checkpoints" / "step-00000000"
    state = read_state(step)
    assert (state.step, state.consumed_rows, state.scalars) == (0, 0, {"step": 0, "updates": 0})
    buffers = {"msgdw_r": ["momentum_buffer"], "adamw": ["exp_avg", "exp_avg_sq"]}[optim]
    expected = {
        f"model.{name}": t.bfloat16().float() if "gain" in name else t
        for name, t in nano_weights.items()
    }
    expected |= {
        f"{buffer}.{name}": torch.zeros(t.shape)
        for buffer in buffers
        for name, t in nano_weights.items()
    }
    assert equal(tensors(step), expected)
    assert main(["checkpoint", "verify", str(step)]) == 0
    # and back, and from the full file
    assert (
        main(["checkpoint", "convert", str(step), str(tmp_path / "full.safetensors"), "--full"])
        == 0
    )
    again = tiny(corpus, tmp_path / "again", f"optim={optim}")
    assert main(["checkpoint", "convert", str(tmp_path / "full.safetensors"), *again]) == 0
    assert equal(tensors(tmp_path / "again" / "checkpoints" / "step-00000000"), expected)
    capsys.readouterr()
    assert main(["checkpoint", "convert", str(file), *overrides]) == 2
    assert "holds checkpoints already; take another run.name" in capsys.readouterr().err


def test_convert_takes_the_model_from_the_file_but_for_what_is_given(
    corpus, tmp_path, capsys, nano_weights
):
    from dnt_scale import config

    file = tmp_path / "w.safetensors"
    model = config.load(tiny(corpus, tmp_path)).model.model_copy(
        update={"name": "${oc.env:HOME}", "activation": "relu"}
    )
    save_file(nano_weights, file, {"model": model.model_dump_json()})
    given = [line for line in tiny(corpus, tmp_path / "new") if not line.startswith("model")]
    assert main(["checkpoint", "convert", str(file), *given, "model.width=128"]) == 2
    assert "tok_emb.weight has shape (512, 64)" in capsys.readouterr().err
    assert main(["checkpoint", "convert", str(file), *given, "model.activation=gelu_tanh"]) == 0
    found = read_state(tmp_path / "new" / "checkpoints" / "step-00000000").config["model"]
    assert found == {**model.model_dump(), "name": "converted", "activation": "gelu_tanh"}
    save_file(nano_weights, file, {"model": '{"name": "a", "layers": "many"}'})
    assert main(["checkpoint", "convert", str(file), *given, f"run.dir={tmp_path}/b"]) == 2
    assert (
        f"error: {file}: model.layers in its metadata: Input should be a valid integer"
        in capsys.readouterr().err
    )


def test_convert_leaves_out_what_pads_the_vocabulary_and_puts_it_back(
    corpus, tmp_path, capsys, nano_weights
):
    file = tmp_path / "w.safetensors"
    padding = ["model.vocab_multiple=96", "model.kv_heads=1", "model.positions=rope"]
    padding += ["model.rope={theta: 500, scaling: linear, factor: 2}"]
    weights = {name: t for name, t in nano_weights.items() if name != "pos_emb.weight"}
    for name, t in weights.items():
        weights[name] = t[:32].clone() if re.search(r"w_[kv]\.weight", name) else t
    save_file(weights, file)
    run = tiny(corpus, tmp_path / "run", *padding)
    assert main(["checkpoint", "convert", str(file), *run]) == 0
    step = tmp_path / "run" / "checkpoints" / "step-00000000"
    stored = tensors(step)["model.tok_emb.weight"]
    assert stored.shape == (576, 64) and not stored[512:].any()
    assert torch.equal(stored[:512], weights["tok_emb.weight"])
    # a file for others has the vocabulary's rows, and tells of the model
    exported, full = tmp_path / "exported.safetensors", tmp_path / "full.safetensors"
    assert main(["checkpoint", "convert", str(step), str(exported)]) == 0
    assert equal(load_file(exported), weights)
    assert main(["checkpoint", "convert", str(step), str(full), "--full"]) == 0
    assert equal(load_file(full), tensors(step))
    for number, source in enumerate((exported, full)):
        given = [o for o in tiny(corpus, tmp_path / str(number)) if not o.startswith("model")]
        assert main(["checkpoint", "convert", str(source), *given]) == 0
        again = tmp_path / str(number) / "checkpoints" / "step-00000000"
        assert equal(tensors(again), tensors(step))
        assert read_state(again).config["model"] == read_state(step).config["model"]


def lose(weights: dict[str, torch.Tensor]) -> str:
    del weights["norm_out.gain"]
    return "it has no norm_out.gain; give the model= that the weights are of"


def add(weights: dict[str, torch.Tensor]) -> str:
    weights["lm_head.bias"] = weights["other"] = torch.zeros(3)
    return "the model has no lm_head.bias and 1 more"


def reshape(weights: dict[str, torch.Tensor]) -> str:
    weights["tok_emb.weight"] = torch.zeros(511, 64)
    return "tok_emb.weight has shape (511, 64) and dtype torch.float32, expected (512, 64)"


def to_int(weights: dict[str, torch.Tensor]) -> str:
    weights["tok_emb.weight"] = torch.zeros(512, 64, dtype=torch.int32)
    return "tok_emb.weight has shape (512, 64) and dtype torch.int32"


@pytest.mark.parametrize("change", [lose, add, reshape, to_int])
def test_weights_of_another_model_are_refused(corpus, tmp_path, capsys, nano_weights, change):
    weights = dict(nano_weights)
    message = change(weights)
    save_file(
        {name: tensor.clone() for name, tensor in weights.items()}, tmp_path / "w.safetensors"
    )
    assert (
        main(
            [
                "checkpoint",
                "convert",
                str(tmp_path / "w.safetensors"),
                *tiny(corpus, tmp_path / "run"),
            ]
        )
        == 2
    )
    assert f"{tmp_path}/w.safetensors: {message}" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_convert_wants_one_file_or_a_run(me, corpus, tmp_path, capsys):
    write(tmp_path / "run", some_tensors(), me)
    assert main(["checkpoint", "convert", str(tmp_path / "run"), "out.bin"]) == 2
    assert "expected one file NAME.safetensors" in capsys.readouterr().err
    shutil.copyfile(
        sorted((tmp_path / "run").glob("*/*.safetensors"))[0], tmp_path / "w.safetensors"
    )
    assert (
        main(["checkpoint", "convert", str(tmp_path / "w.safetensors"), str(tmp_path / "run")]) == 2
    )
    assert "after it come KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "diff", "convert"])
def test_a_missing_file_is_told_by_every_command(me, tmp_path, capsys, command):
    path = write(tmp_path, some_tensors(), me)
    file = next(path.glob("*.safetensors"))
    file.unlink()
    more = {"inspect": [], "diff": [path], "convert": [tmp_path / "out.safetensors"]}[command]
    assert main(["checkpoint", command, str(path), *map(str, more)]) == 2
    assert f"{file}: missing" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_convert_refuses_a_damaged_file(me, tmp_path, capsys):
    path = write(tmp_path, some_tensors(), me)
    file = next(path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["checkpoint", "convert", str(path), str(tmp_path / "out.safetensors")]) == 2
    assert f"{file}: damaged: its sha256 is not the recorded one" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
