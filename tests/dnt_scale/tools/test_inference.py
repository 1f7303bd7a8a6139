"""`dnt generate` and `dnt eval` on the reference run."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.shards import load_manifest, write_manifest
from testbed.run import call, dnt, metrics, synthetic_set

PROMPT = "def main(self, größe):\n"


def texts(run_dir: Path, settings: list[dict]) -> None:
    """Print the text that each of the settings gives."""
    from dnt_scale.distributed import process_group
    from dnt_scale.tools.generate import Asked, load_writer
    from dnt_scale.tools.inference import checkpoint_of
    from dnt_scale.tools.sampling import Sampling

    found = []
    with process_group.alone() as me:
        writer = load_writer(checkpoint_of(run_dir), me, Asked(), None)
        for setting in settings:
            sampling = {key: setting[key] for key in ("temperature", "top_k") if key in setting}
            asked = Asked(setting.get("tokens", 30), Sampling(**sampling), setting.get("seed", 0))
            pieces = replace(writer, asked=asked).stream(PROMPT)
            found.append("".join(piece.text for piece in pieces))
    print(json.dumps(found))


def losses(run_dir: Path) -> None:
    """Print the last set's loss on the rows that the run itself used, and on all."""
    from dnt_scale.distributed import process_group
    from dnt_scale.tools.inference import checkpoint_of, evaluate

    with process_group.alone() as me:
        found = [evaluate(checkpoint_of(run_dir), None, rows, me) for rows in (10, None)]
    print(
        json.dumps(
            [
                [value for name, value in each.items() if name.endswith("/loss")][-1]
                for each in found
            ]
        )
    )


def test_sampling_is_a_function_of_its_settings(reference):
    settings = [{"seed": 1}, {"seed": 1}, {"seed": 2}]
    settings += [
        {"temperature": 0, "seed": 1},
        {"temperature": 0, "seed": 2},
        {"top_k": 1},
        {"top_k": 0},
        {"tokens": 5},
    ]
    found = json.loads(call(texts, reference, settings).ok().out)
    one, again, other, cold, colder, top_one, any_token, short = found
    assert one == again != other
    assert cold == colder == top_one
    assert all(text.startswith(PROMPT) for text in found)
    assert len(any_token) > len(PROMPT) and len(PROMPT) < len(short) < len(one) + len(PROMPT)


def test_a_prompt_that_is_no_utf8_is_continued(reference):
    done = dnt("generate", reference, "--prompt", os.fsdecode(b"\xff\xfeabc"), "--tokens", 3).ok()
    assert done.out.startswith("\ufffd\ufffdabc")


def test_where_data_has_moved_the_advice_helps(finished_run, corpus):
    path = finished_run / "config.yaml"
    path.write_text(path.read_text().replace(str(corpus), "/gone/set"))
    for command in (["generate", finished_run, "--tokens", 3], ["eval", finished_run, "--rows", 5]):
        error = dnt(*command).error()
        assert "/gone/set: no such folder" in error and error.endswith(
            "give its new place with --data"
        )
        dnt(*command, "--data", corpus).ok()


def test_generate_prints_the_prompt_and_goes_on(reference):
    done = dnt("generate", reference, "--prompt", PROMPT, "--tokens", 10, "--seed", 5).ok()
    assert done.out.startswith(PROMPT)
    assert len(done.out.rstrip("\n")) > len(PROMPT.rstrip("\n"))


def test_eval_is_the_validation_of_the_run(reference):
    of_the_run, of_all = json.loads(call(losses, reference).ok().out)
    assert of_the_run == pytest.approx(metrics(reference)[-1]["val/loss"], abs=1e-6)
    assert of_all != of_the_run
    printed = dnt("eval", reference, "--rows", 10).ok().out
    found = dict(line.split() for line in printed.splitlines())
    last = metrics(reference)[-1]
    assert found.keys() == {"val/loss", "val/perplexity", "val/bits_per_byte"}
    for name, value in found.items():
        assert float(value) == pytest.approx(last[name], abs=1e-3)


def test_an_earlier_checkpoint_is_taken_by_its_step(reference, tmp_path):
    by_step = {line["step"]: line["val/loss"] for line in metrics(reference) if "val/loss" in line}
    at_6, at_12, at_20 = (
        float(dnt("eval", reference, "--rows", 10, "--step", step).ok().out.split()[1])
        for step in (6, 12, 20)
    )
    assert at_6 > by_step[10] > at_12 > by_step[20] == pytest.approx(at_20, abs=1e-3)

    early, late = (
        dnt("generate", reference, "--prompt", PROMPT, "--tokens", 20, "--step", step).ok().out
        for step in (6, 20)
    )
    assert early != late == dnt("generate", reference, "--prompt", PROMPT, "--tokens", 20).ok().out

    out = tmp_path / "exported"
    assert "step 6 " in dnt("export", reference, "--to", "hf", out, "--step", 6).ok().out


def test_a_step_without_a_checkpoint_is_refused_with_those_that_there_are(reference, tmp_path):
    commands: list[list[object]] = [
        ["eval", reference],
        ["generate", reference],
        ["classify", reference, tmp_path / "a.png"],
        ["diagnose", reference],
        ["export", reference, "--to", "hf", tmp_path / "out"],
    ]
    for command in commands:
        error = dnt(*command, "--step", 7).error()
        assert "--step: " in error and "of step 7; it has those of 6, 12, 18, 20" in error, command


def test_a_run_without_a_checkpoint_is_refused(finished_run):
    shutil.rmtree(finished_run / "checkpoints")
    error = dnt("generate", finished_run).error()
    assert f"{finished_run / 'checkpoints'}: no complete checkpoint" in error


def test_no_run_there_is_refused(tmp_path):
    assert (
        f"{tmp_path / 'none' / 'config.yaml'}: no such file"
        in dnt("generate", tmp_path / "none").error()
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model: {name: [", "not readable as YAML"),
        ("model: dnt_nano\n", "model: "),
        ("", "config.yaml"),
        ("\udcff\udcfe", "config.yaml"),
    ],
)
def test_a_damaged_config_is_refused(finished_run, text, complaint):
    path = finished_run / "config.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    error = dnt("generate", finished_run).error()
    assert error.startswith(f"error: {path}: ") and complaint in error


def test_another_tokenizer_is_refused(reference, tmp_path):
    other = synthetic_set(tmp_path / "set")
    for command in ("generate", "eval"):
        error = dnt(command, reference, "--data", other).error()
        assert f"{other}: made with another tokenizer" in error and "step-00000020" in error


def test_a_damaged_checkpoint_is_refused(finished_run):
    shard = next((finished_run / "checkpoints" / "step-00000020").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard}: truncated" in dnt("eval", finished_run).error()


def test_eval_of_a_mixture_is_by_set_and_with_its_mask(mixed_run):
    of_the_run, _ = json.loads(call(losses, mixed_run).ok().out)
    assert of_the_run == pytest.approx(metrics(mixed_run)[-1]["val/packed/loss"], abs=1e-6)
    printed = dnt("eval", mixed_run, "--rows", 10).ok().out
    found = {name: float(value) for name, value in (line.split() for line in printed.splitlines())}
    last = metrics(mixed_run)[-1]
    assert found.keys() == {key for key in last if key.startswith("val/")}
    assert {"val/loss", "val/docs/loss", "val/packed/loss"} < found.keys()
    for name, value in found.items():
        assert value == pytest.approx(last[name], abs=1e-3)


def test_another_set_is_measured_alone(mixed_run, corpus):
    printed = dnt("eval", mixed_run, "--rows", 10, "--data", corpus).ok().out
    assert {line.split()[0] for line in printed.splitlines()} == {
        "val/loss",
        "val/perplexity",
        "val/bits_per_byte",
    }
    assert float(printed.split()[1]) == pytest.approx(
        metrics(mixed_run)[-1]["val/docs/loss"], abs=1e-3
    )


def test_a_text_is_one_document_masked_or_not_beyond_the_context_too(mixed_run, tmp_path):
    plain = Path(shutil.copytree(mixed_run, tmp_path / "run", symlinks=True))
    config = (plain / "config.yaml").read_text()
    assert "document_mask: true" in config
    (plain / "config.yaml").write_text(
        config.replace("document_mask: true", "document_mask: false")
    )
    settings = [{"tokens": 90, "temperature": 0}, {"tokens": 90, "seed": 1}]
    masked, unmasked = (
        json.loads(call(texts, folder, settings).ok().out) for folder in (mixed_run, plain)
    )
    assert masked == unmasked and len(masked[0]) > 64  # the context, in tokens


def test_generate_needs_one_set_of_a_mixture_and_eval_all(mixed_run, corpus, tmp_path):
    run_dir = Path(shutil.copytree(mixed_run, tmp_path / "run", symlinks=True))
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace(str(corpus), str(tmp_path / "gone")))
    settings = ["--prompt", PROMPT, "--tokens", 5]
    assert (
        dnt("generate", run_dir, *settings).ok().out
        == dnt("generate", mixed_run, *settings).ok().out
    )
    assert str(tmp_path / "gone") in dnt("eval", run_dir, "--rows", 10).error()


def test_eval_names_the_set_without_a_validation_split(mixed_run, corpus, packed, tmp_path):
    manifest = load_manifest(corpus)
    bare = Path(shutil.copytree(corpus, tmp_path / "bare"))
    train, val = manifest.splits["train"], manifest.splits["val"]
    [source] = manifest.sources
    left = {"documents": train.documents, "text_bytes": train.text_bytes}
    assert source.documents == train.documents + val.documents
    changes = {"splits": {"train": train}, "sources": (source.model_copy(update=left),)}
    write_manifest(bare, manifest.model_copy(update=changes))
    run_dir = Path(shutil.copytree(mixed_run, tmp_path / "run", symlinks=True))
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace(str(corpus), str(bare)))
    assert f"data.mixture.docs.path: {bare} has no validation split" in dnt("eval", run_dir).error()
    assert (
        f"--data: {bare} has no validation split" in dnt("eval", mixed_run, "--data", bare).error()
    )
