"""The `dnt` command: it teaches, and what a user can cause is one clear line and exit 2."""

import os
import shutil
from pathlib import Path

import pytest
import yaml

from data_prep.options import PrepareOptions
from data_prep.pipeline import prepare
from dnt_scale import config
from testbed.corpus import python_source_files
from testbed.run import dnt, python, synthetic_set, tiny, train

OPTIMIZERS = sorted(file.stem for file in (config.config_dir() / "optim").glob("*.yaml"))


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("arguments", "taught"),
    [
        ([], "dnt"),
        (["train"], "dnt train run.name=first data.path=data/mine"),
        (["data"], "dnt data prepare books/"),
        (["data", "prepare"], "--vocab-size"),
        (["generate"], "runs/demo"),
        (["eval"], "runs/demo"),
        (["ui"], "sqlite:///runs/mlflow.db"),
    ],
)
def test_help_teaches(arguments, taught):
    out = dnt(*arguments, "--help").ok().out
    assert out.startswith("usage: ")
    assert taught in out
    if not arguments:
        assert all(command in out for command in ("data", "train", "generate", "eval", "ui"))


def test_no_command_and_an_unknown_one_exit_2():
    for arguments in ([], ["fly"], ["data"], ["train", "--fly"]):
        error = dnt(*arguments).error()
        help_of = "train" if "train" in arguments else "data" if "data" in arguments else ""
        assert error.endswith(f"; `{' '.join(['dnt', help_of]).strip()} --help` shows how")


def test_print_config_round_trips(corpus, tmp_path):
    overrides = tiny(
        corpus,
        tmp_path / "run",
        "optim=adamw",
        "train.steps=null",
        "train.tokens=1_000_000",
        "run.seed=7",
    )
    printed = dnt("train", "--print-config", *overrides).ok().out
    assert config.validate(yaml.safe_load(printed)) == config.load(overrides)
    assert not (tmp_path / "run").exists()


def test_the_config_in_the_run_folder_is_the_run(reference):
    run = config.from_yaml(reference / "config.yaml")
    assert run.run.dir == reference
    assert config.to_yaml(run) == (reference / "config.yaml").read_text()


def test_data_prepare_verify_info(tmp_path):
    text, out = tmp_path / "text", tmp_path / "set"
    text.mkdir()
    for path in python_source_files(200_000):
        shutil.copyfile(path, text / f"{path.parent.name}-{path.name}")
    options = ["--vocab-size", 400, "--seq-len", 32, "--val-fraction", 0.2, "--workers", 1]
    dnt("data", "prepare", text, "--out", out, *options).ok()
    assert "whole" in dnt("data", "verify", out).ok().out
    info = dnt("data", "info", out).ok().out
    assert "train" in info and "val" in info and "400" in info
    error = dnt("data", "prepare", text, "--out", out, *options).error()
    assert f"{out}: already holds a prepared set" in error

    shard = out / "train-000000.tar"
    shard.chmod(0o644)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 8
    shard.write_bytes(data)
    assert str(shard) in dnt("data", "verify", out).error()
    assert f"{tmp_path / 'none'}: no such folder" in dnt("data", "info", tmp_path / "none").error()


def test_an_error_of_the_installed_module_is_one_line(tmp_path):
    overrides = tiny(tmp_path / "nowhere", tmp_path / "run")
    error = python("-m", "dnt_scale.train", *overrides).error()
    assert f"{tmp_path / 'nowhere'}: no such folder" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["data.path=???"], "data.path"),
        (["optim.lrr=1.0"], "did you mean optim.lr?"),
        (["model=dnt_124"], "dnt_124m"),
        (["optim"], ", ".join(OPTIMIZERS)),
        (["steps"], "key=value"),
        (["=1"], "no such key"),
        (["hydra.verbose=true"], "no such key"),
        (["optim.dampening=1"], "optim.dampening"),
        (["optim=adamw", "optim.betas=[2,3]"], "optim.betas"),
        (["optim.lr=fast"], "optim.lr"),
        (["optim.lr=-1"], "optim.lr"),
        (["train.steps=null"], "set one of steps and tokens"),
        (["model.heads=3"], "not divisible by heads 3"),
        (["model.vocab_size=256"], "model.vocab_size is 256"),
        (["model.context=32"], "model.context is 32"),
        (["optim.schedule.warmup_steps=20"], "optim.schedule.warmup_steps is 20"),
        (["optim.groups.embedding.pattern=nothing"], "matches no parameter"),
        (["run.seed=18446744073709551616"], "run.seed"),
        (["tracking.uri=http://me:secret@localhost:5000"], "MLFLOW_TRACKING_PASSWORD"),
        (["run.name=a/b"], "run.name"),
    ],
)
def test_a_wrong_override_is_refused(corpus, tmp_path, overrides, complaint):
    assert complaint in train(tiny(corpus, tmp_path / "run", *overrides)).error()
    assert not (tmp_path / "run").exists()


def test_a_batch_that_ranks_cannot_share_is_refused(corpus, tmp_path):
    error = train(tiny(corpus, tmp_path / "run", "train.global_batch=9"), ranks=2).error()
    assert "train.global_batch is 9, not divisible by 2 ranks" in error


def test_validation_without_a_validation_split_is_refused(tmp_path):
    data = synthetic_set(tmp_path / "set", val=False)
    error = train(tiny(data, tmp_path / "run")).error()
    assert "data.path: eval.every is 5" in error and f"{data} has no validation split" in error


def test_a_truncated_manifest_is_refused(corpus, tmp_path):
    data = shutil.copytree(corpus, tmp_path / "set")
    manifest = data / "manifest.json"
    os.truncate(manifest, manifest.stat().st_size // 2)
    assert (
        f"{manifest}: truncated or damaged" in train(tiny(data, tmp_path / "run"), ranks=2).error()
    )


def test_a_truncated_or_missing_shard_is_refused(corpus, tmp_path):
    data = shutil.copytree(corpus, tmp_path / "set")
    shard = data / "train-000001.tar"
    os.truncate(shard, shard.stat().st_size - 1)
    assert f"{shard}: truncated" in train(tiny(data, tmp_path / "run")).error()
    shard.unlink()
    assert f"{shard}: missing" in train(tiny(data, tmp_path / "run")).error()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_folder_that_cannot_be_made_is_refused(corpus, tmp_path, ranks):
    (tmp_path / "file").write_text("")
    done = train(tiny(corpus, tmp_path / "file" / "run"), ranks=ranks)
    # the other ranks lose rank 0 and say that in a line of their own
    assert str(tmp_path / "file") in done.error()
    assert done.codes == [2] * ranks


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("model.layers=3", "model.layers: "),
        ("model.setting=S5", "model.setting: "),
        ("run.seed=1", "run.seed: "),
        ("train.global_batch=16", "train.global_batch: "),
        ("optim=adamw", "optim.algorithm: "),
    ],
)
def test_a_resumed_run_may_not_change_what_it_is(corpus, finished_run, override, complaint):
    before = tree(finished_run)
    error = train(tiny(corpus, finished_run, override)).error()
    assert complaint in error and "step-00000020 was trained with" in error
    assert tree(finished_run) == before


def test_a_run_that_is_past_its_budget_is_refused(corpus, finished_run):
    before = tree(finished_run)
    error = train(tiny(corpus, finished_run, "train.steps=10")).error()
    assert (
        "train.steps: this run asks for 10 steps" in error
        and "step-00000020 already has 20" in error
    )
    assert tree(finished_run) == before


def test_ranks_that_cannot_share_the_batch_leave_the_run_alone(corpus, finished_run):
    before = tree(finished_run)
    assert "not divisible by 3 ranks" in train(tiny(corpus, finished_run), ranks=3).error()
    assert tree(finished_run) == before


def test_a_resumed_run_may_not_change_its_tokenizer(finished_run, tmp_path):
    before = tree(finished_run)
    other = synthetic_set(tmp_path / "other")
    error = train(tiny(other, finished_run)).error()
    assert (
        f"data.path: {other} was made with another tokenizer" in error and "step-00000020" in error
    )
    assert tree(finished_run) == before


def test_a_resumed_run_may_not_change_its_data(corpus, finished_run, tmp_path):
    from rich.console import Console

    before = tree(finished_run)
    other = tmp_path / "other"
    inputs, tokenizer = python_source_files(300_000), corpus / "tokenizer.model"
    prepare(
        PrepareOptions(inputs, other, tokenizer=tokenizer, seq_len=64, val_fraction=0.2, workers=1),
        Console(quiet=True),
    )
    error = train(tiny(other, finished_run)).error()
    assert f"data.path: the manifest of {other} is not the one that" in error
    assert tree(finished_run) == before
