"""`dnt export` and `dnt import`: what transformers makes of a folder, and the way back."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    dynamic_module_utils,
)

from data_prep.shards import load_manifest
from data_prep.tokenizer import Tokenizer
from data_prep.train_tokenizer import train as train_tokenizer
from dnt_scale.checkpoint.state import State, read_state
from dnt_scale.checkpoint.storage import Storage
from dnt_scale.cli.main import main
from dnt_scale.model.dnt import DNT
from dnt_scale.tools.hugging_face.export import write_weights
from dnt_scale.tools.hugging_face.model_card import card, commit
from dnt_scale.tools.hugging_face.tokenizer_json import write_tokenizer
from testbed.configs import composed
from testbed.corpus import python_source_files
from testbed.run import tensors, tiny
from tests.helpers.made_run import made_run
from tests.helpers.models import random_tokens

GPT2 = ["setting=S1", "norm=layernorm", "bias=true", "activation=gelu_tanh", "norm_eps=1e-5"]
LLAMA = ["setting=S1", "positions=rope", "activation=swiglu", "ffn_size=80", "kv_heads=1"]
SCALED = ["rope.scaling=llama3", "rope.factor=4", "rope.original_context=32", "rope.theta=500"]
OPTIONS = ["positions=rope", "kv_heads=1", "head_size=24", "activation=geglu_tanh", "ffn_size=40"]
PADDED = ["vocab_multiple=100", "tied_head=false"]
# overrides of model.*, and the class of transformers that has just these settings
MODELS = {
    "gpt2": (GPT2, "GPT2LMHeadModel"),
    "gpt2 with an own head": ([*GPT2, "tied_head=false", "activation=gelu"], "GPT2LMHeadModel"),
    "llama": (LLAMA, "LlamaForCausalLM"),
    "llama 3, padded, of biases": (
        [*LLAMA, *SCALED, *PADDED, "bias=true", "activation=geglu"],
        "LlamaForCausalLM",
    ),
    "dnt": (["setting=S4"], "DNTForCausalLM"),
    "dnt S5 with every option": (
        ["setting=S5", *OPTIONS, *SCALED, *PADDED, "logit_cap=3", "z_loss=1e-4"],
        "DNTForCausalLM",
    ),
    "layernorm": (
        ["setting=peri", "norm=layernorm", "bias=true", "final_norm=false", "positions=none"],
        "DNTForCausalLM",
    ),
    "linear": (["positions=rope", "rope.scaling=linear", "rope.factor=2"], "DNTForCausalLM"),
}


@pytest.fixture(autouse=True)
def no_code_in_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """transformers copies a folder's code before it runs it."""
    place = tmp_path_factory.getbasetemp() / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(place))


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@torch.no_grad()
def greedy(model: DNT, ids: list[int], tokens: int, known: int, eos: int) -> list[int]:
    """As `dnt generate` does: without a cache, of the tokenizer's ids only."""
    for _ in range(tokens):
        ids = [*ids, int(model(torch.tensor([ids]))[0, -1, :known].argmax())]
        if ids[-1] == eos:
            break
    return ids


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_and_it_comes_back(
    name: str, tmp_path: Path, corpus: Path
) -> None:
    overrides, kind = MODELS[name]
    run, model = made_run(tmp_path, corpus, overrides)
    out = tmp_path / "out"
    assert main(["export", str(run), "--to", "hf", str(out), "--shard-gb", "0.001"]) == 0
    theirs = loaded(out)
    assert type(theirs).__name__ == kind
    assert (out / "modeling_dnt.py").exists() == (kind == "DNTForCausalLM")
    tokens = random_tokens(model.config, 2, model.config.context)
    with torch.no_grad():
        ours = model(tokens)
        assert ours.std() > 0.2  # not a comparison of zeros
        torch.testing.assert_close(theirs(tokens).logits, ours, atol=1e-5, rtol=0)

    manifest = load_manifest(corpus)
    prompt = [manifest.eos_id, *range(60, 70)]
    wanted = greedy(model, prompt, 40, manifest.tokenizer.vocab_size, manifest.eos_id)
    for more in ({}, {"cache_implementation": "static"}):
        asked = {"max_new_tokens": 40, "do_sample": False, **more}
        assert theirs.generate(torch.tensor([prompt]), **asked)[0].tolist() == wanted
    check_padding(theirs, tokens)
    source = out
    if "option" in name:  # as one that was trained further comes back
        theirs.save_pretrained(source := tmp_path / "saved")
    check_training(theirs, tokens)

    again = tiny(corpus, tmp_path / "again")
    unshaped = [each for each in again if not each.startswith("model")]
    more = [f"model.{each}" for each in overrides if "vocab_multiple" in each or "loss" in each]
    assert main(["import", str(source), *unshaped, *more]) == 0
    step = "checkpoints/step-00000000"
    before, after = tensors(run / step), tensors(tmp_path / "again" / step)
    weights = [key for key in before if key.startswith("model.")]
    assert len(weights) == len(dict(model.named_parameters()))
    assert weights == [key for key in after if key.startswith("model.")]
    assert all(torch.equal(before[key], after[key]) for key in weights)


@torch.no_grad()
def check_padding(theirs: PreTrainedModel, tokens: Tensor) -> None:
    """A row that is padded on the left has the logits it has alone."""
    short = tokens[:1, :9]
    padded = torch.cat([tokens[1:, :5], short], dim=1)
    mask = torch.cat([torch.zeros(1, 5), torch.ones(1, 9)], dim=1).long()
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    found = theirs(padded, attention_mask=mask, position_ids=places).logits[:, 5:]
    torch.testing.assert_close(found, theirs(short).logits, atol=1e-5, rtol=0)


def check_training(theirs: PreTrainedModel, tokens: Tensor) -> None:
    theirs.train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
    before = theirs(tokens, labels=tokens).loss
    before.backward()
    optimizer.step()
    assert theirs(tokens, labels=tokens).loss < before


ELSEWHERE = """
import sys
from pathlib import Path

ours = "dnt_scale", "data_prep", "cluster", "testbed"
sys.modules |= dict.fromkeys(ours)  # importing one is an error now
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, given, *tokenizers = map(Path, sys.argv[1:])
wanted = load_file(given)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokens = wanted["tokens"]
with torch.no_grad():
    torch.testing.assert_close(model(tokens).logits, wanted["logits"], atol=1e-5, rtol=0)
found = model.generate(wanted["text"][:, :11], max_new_tokens=40, do_sample=False)
assert torch.equal(found, wanted["text"]), (found, wanted["text"])
model.train()
loss = model(tokens, labels=tokens).loss
loss.backward()
torch.optim.SGD(model.parameters(), lr=0.01).step()
assert model(tokens, labels=tokens).loss < loss
for place in tokenizers:
    theirs = AutoTokenizer.from_pretrained(place, trust_remote_code=True)
    ids = theirs("import os\\n", add_special_tokens=False).input_ids
    assert ids == wanted[place.name].tolist(), (place, ids)
assert not any(sys.modules.get(name) for name in ours)
"""


def test_a_process_that_has_not_this_project_does_the_same(tmp_path: Path, corpus: Path) -> None:
    """The code in the folders is all that it needs, beside transformers and SentencePiece."""
    overrides = ["setting=S4", *OPTIONS, "vocab_multiple=100"]
    run, model = made_run(tmp_path, corpus, overrides)
    out, unigram = tmp_path / "out", tmp_path / "unigram"
    assert main(["export", str(run), "--to", "hf", str(out)]) == 0
    manifest = load_manifest(corpus)
    file = tmp_path / "own.model"
    train_tokenizer(["".join(islice(lines_of_text(), 2000))], 700, file, "unigram")
    unigram.mkdir()
    write_tokenizer(file, Tokenizer.load(file).eos_id, 64, unigram)
    tokens = random_tokens(model.config, 2, model.config.context)
    prompt = [manifest.eos_id, *range(60, 70)]
    text = greedy(model, prompt, 40, manifest.tokenizer.vocab_size, manifest.eos_id)
    wanted = {"tokens": tokens, "text": torch.tensor([text])}
    for name, model_file in (("out", corpus / manifest.tokenizer.file), ("unigram", file)):
        wanted[name] = torch.tensor(Tokenizer.load(model_file).encode("import os\n"))
    with torch.no_grad():
        wanted["logits"] = model(tokens).contiguous()
    save_file(wanted, tmp_path / "wanted")
    subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, out, tmp_path / "wanted", out, unigram],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        check=True,
    )


def test_in_bf16_and_in_shards(tmp_path: Path, corpus: Path) -> None:
    run, model = made_run(tmp_path, corpus, ["setting=S4", "ffn_size=2048"])
    out = tmp_path / "out"
    options = ["--dtype", "bf16", "--shard-gb", "0.001"]
    assert main(["export", str(run), "--to", "hf", str(out), *options]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert all((out / file).stat().st_size < 1.1e6 for file in files)
    stored = load_file(out / files[0]) | load_file(out / files[1])
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in stored.values())
    assert stored.keys() == index["weight_map"].keys() == dict(model.named_parameters()).keys()
    for name, value in model.named_parameters():
        assert torch.equal(stored[name], value.detach().bfloat16())
    assert loaded(out).dtype == torch.bfloat16
    card = (out / "README.md").read_text()
    assert load_manifest(corpus).tokenizer.sha256 in card and "trust_remote_code=True" in card
    assert "| code | dnt-scale |" in card


def test_a_card_tells_of_the_stages_that_have_begun(tmp_path: Path) -> None:
    """And a bar in a name ends no cell."""
    stages = [
        "train.stages.both.after_step=10",
        "train.stages.both.global_batch=24",
        "train.stages.both.data.mixture.a={path: x/good, weight: 1}",
        "train.stages.both.data.mixture.b={path: 'x/b|d', weight: 3}",
        "train.stages.end.after_step=20",
        "train.stages.end.decay_to=0",
        "optim=muon_normalized",
    ]
    run = composed(*tiny(tmp_path / "web", tmp_path, "train.steps=30", *stages))
    rows = f"{run.train.global_batch} rows"
    state = State(
        step=10,
        consumed_rows=0,
        skipped=0,
        seed=0,
        run_id="id",
        manifest_sha256="abc",
        sets={"": "abc"},
        stages={"both": {"a": "def"}},
        world_size=1,
        config={},
        files={},
        tokens=5000,
    )

    def told(step: int) -> str:
        return card(run, tmp_path, state.model_copy(update={"step": step}), "fp32", "dnt")

    mixed = composed(*tiny(tmp_path, tmp_path, "optim=msgdw_adam"))
    assert mixed.optim.title == "msgdw (adamw)"
    alone = told(10)
    assert f"| trained | 10 steps of {rows}, 5,000 tokens |" in alone
    assert "| data | web (manifest sha256 abc) |" in alone and "after 10 steps" not in alone
    assert "msgdw (orthogonalized, row_column_normalized, tensor_normalized)" in alone
    both = told(20)
    assert "| trained | 20 steps, 5,000 tokens |" in both
    assert f"| data | {rows} a step; web (manifest sha256 abc) |" in both
    good = "0.25 good (manifest sha256 def), 0.75 b&#124;d"
    assert f"| after 10 steps | 24 rows a step; {good} |" in both and "after 20" not in both
    assert "| after 20 steps | 24 rows a step |" in told(21)
    masked = run.data.model_copy(update={"document_mask": True})
    assert "| documents |" not in both
    run = run.model_copy(update={"data": masked})
    assert "| documents | attention stayed inside each" in told(20)


def test_the_commit_of_a_run_is_where_a_tracker_or_a_submission_has_noted_it(
    tmp_path: Path,
) -> None:
    assert commit(tmp_path) == ""
    code, order = tmp_path / "jobs" / "code", tmp_path / "logs" / "tracking.json"
    code.mkdir(parents=True)
    (code / "COMMIT").write_text("abc1\n")
    assert commit(tmp_path) == ", commit abc1"
    order.parent.mkdir()
    for noted, shown in (("abc2-dirty", ", commit abc2-dirty"), ("unknown", "")):
        order.write_text(json.dumps({"tags": {"git_commit": noted}}))
        assert commit(tmp_path) == shown


def test_a_new_model_of_the_class_begins_as_ours(tmp_path: Path, corpus: Path) -> None:
    run, _ = made_run(tmp_path, corpus, ["setting=S4"])
    assert main(["export", str(run), "--to", "hf", str(tmp_path / "out")]) == 0
    theirs = loaded(tmp_path / "out")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        new = type(theirs)(theirs.config)
    block = new.blocks[1]
    scale = {"w_q": 0.02, "w_o": 0.01}  # 0.02 / sqrt(2 x 2 layers)
    for name, std in scale.items():
        assert block.attn.get_submodule(name).weight.std().item() == pytest.approx(std, rel=0.1)
    assert torch.equal(block.norm_mid1.gain, torch.ones(64))


def test_the_average_is_what_is_written(tmp_path: Path, corpus: Path) -> None:
    run, model = made_run(tmp_path, corpus, ["setting=S4"], "train.ema=0.9")
    folder = run / "checkpoints" / "step-00000000"
    (file,) = folder.glob("*.safetensors")
    doubled = {
        name: 2 * value if name.startswith("ema.") else value
        for name, value in load_file(file).items()
    }
    save_file(doubled, file)
    state = read_state(folder)
    write_weights(Storage(folder), state, model.config, "dnt", tmp_path, torch.float32, 5.0)
    stored = load_file(tmp_path / "model.safetensors")
    for name, value in model.named_parameters():
        assert torch.equal(stored[name], 2 * value.detach())


TRICKY = ["", " ", "a\u2581b", "\u2581\u2581 x", "</s> <unk> <0x41>", "\0\t\n\r\n", "größe 東京 🙂"]
TRICKY += [" " * n + "x" + " " * (17 - n) for n in range(17)] + [
    "aaaaaaa" * 9,
    "\n\n\n \n",
    "e\u0301",
]


def lines_of_text() -> Iterator[str]:
    for path in python_source_files(500_000):
        yield from path.read_text().splitlines(keepends=True)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_tokenizer_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    lines = list(lines_of_text())
    assert len(lines) > 10_000
    file = tmp_path / "own.model"
    train_tokenizer(["".join(lines[:2000])], 700, file, kind)
    ours = Tokenizer.load(file)
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(file, ours.eos_id, 64, out)
    assert (out / "tokenizer.json").exists() == (kind == "bpe")
    theirs = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    texts = [*lines, *TRICKY, "".join(lines[:300]), "".join(lines[:50]).replace("\n", " ")]
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
    for text in TRICKY:
        ids = ours.encode(text)
        assert theirs(text).input_ids == [ours.eos_id, *ids]
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    assert len(theirs) == ours.vocab_size and theirs.eos_token_id == ours.eos_id


def random_theirs(kind: type[PreTrainedModel], settings: object, out: Path) -> PreTrainedModel:
    with torch.random.fork_rng():
        theirs = kind(settings)
    theirs.save_pretrained(out)
    return theirs


def test_a_gpt2_and_a_llama_of_theirs_begin_a_run(tmp_path: Path, corpus: Path) -> None:
    """GPT-2 without its head, as its own folder is; Llama with heads in groups."""
    sizes = {"bos_token_id": 1, "eos_token_id": 1, "vocab_size": 512}
    gpt2 = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **sizes)
    random_theirs(GPT2Model, gpt2, tmp_path / "gpt2")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    llama = LlamaConfig(**shape, num_key_value_heads=2, intermediate_size=48, **sizes)
    theirs = random_theirs(LlamaForCausalLM, llama, tmp_path / "llama")
    others = [
        each for each in tiny(corpus, tmp_path / "x") if not each.startswith(("model", "run.dir"))
    ]
    for name in ("gpt2", "llama"):
        run = f"run.dir={tmp_path / 'runs' / name}"
        assert main(["import", str(tmp_path / name), *others, run]) == 0
    found = tensors(tmp_path / "runs" / "llama" / "checkpoints" / "step-00000000")
    weight = theirs.model.layers[0].self_attn.k_proj.weight
    assert torch.equal(found["model.blocks.0.attn.w_k.weight"], weight)
    assert torch.equal(found["model.head.weight"], theirs.lm_head.weight)


def damage(folder: Path, what: str) -> None:
    """Make a folder of a DNT one that does not fit."""
    weights = folder / "model.safetensors"
    found = load_file(weights)
    settings = json.loads((folder / "config.json").read_text())
    if what == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif what == "outside":
        index = {"weight_map": {"tok_emb.weight": "../model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif what == "missing":
        save_file({n: v for n, v in found.items() if n != "tok_emb.weight"}, weights)
    elif what == "shape":
        save_file(found | {"tok_emb.weight": torch.zeros(3, 3)}, weights)
    elif what == "tokenizer":
        (folder / "tokenizer.model").write_bytes(b"another")
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-8])
    else:
        settings[what] = "bert" if what == "model_type" else -1
    (folder / "config.json").write_text(json.dumps(settings))


def test_what_does_not_fit_is_one_clear_line(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = made_run(tmp_path, corpus, ["setting=S4"])
    others = [each for each in tiny(corpus, tmp_path / "x") if not each.startswith("model")]

    def error(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    expected = {
        "pickle": "pytorch_model.bin, is not read",
        "outside": "'../model.safetensors', expected safetensors files in its own folder",
        "missing": "its weights have no tok_emb.weight",
        "shape": "tok_emb.weight has shape (3, 3)",
        "truncated": "not readable as safetensors",
        "tokenizer": "made with another tokenizer",
        "model_type": "model_type is 'bert', expected dnt, gpt2 or llama",
        "layers": "layers is -1",
    }
    out = tmp_path / "whole"
    assert main(["export", str(run), "--to", "hf", str(out)]) == 0
    wider = "tok_emb.weight has shape (512, 64), the run's model has (512, 32)"
    assert wider in error("import", str(out), *others, "model.width=32")
    for what, text in expected.items():
        out = tmp_path / what
        assert main(["export", str(run), "--to", "hf", str(out)]) == 0
        damage(out, what)
        assert text in error("import", str(out), *others)
        assert not (tmp_path / "x").exists()
    assert "exists already" in error("export", str(run), "--to", "hf", str(tmp_path / "shape"))
    assert "no such file" in error("export", str(tmp_path), "--to", "hf", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
