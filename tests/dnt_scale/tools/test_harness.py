"""`dnt lm-eval`: a run's tasks have the results that the harness finds in the exported folder."""

import json
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import dynamic_module_utils

from data_prep.shards import load_manifest
from data_prep.tokenizer import Tokenizer
from dnt_scale.cli.main import main
from dnt_scale.config import ConfigError
from dnt_scale.tools.harness.evaluate import measured
from dnt_scale.tools.harness.language_model import RunModel, generation
from dnt_scale.tools.harness.tasks import load_tasks
from tests.helpers.harness_tasks import CHOICE, QUESTIONS, write_task
from tests.helpers.made_run import made_run

BEGINNINGS = [
    {"text": "import os", "target": "x"},
    {"text": "class A:\n" * 9, "target": ""},
    {"text": "if ", "target": "y"},
]
UNTIL = """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(autouse=True)
def no_code_in_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """transformers copies a folder's code before it runs it."""
    place = tmp_path_factory.getbasetemp() / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(place))


@pytest.fixture
def tasks(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "tasks"
    return [
        write_task(folder, "own_choice", CHOICE, QUESTIONS),
        write_task(folder, "own_until", UNTIL, BEGINNINGS),
    ]


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=number)
        for number, each in enumerate(arguments)
    ]


def test_results_are_those_of_the_exported_folder(
    tmp_path: Path, corpus: Path, tasks: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = made_run(tmp_path, corpus, ["setting=S4", "positions=rope"])
    out = tmp_path / "out"
    assert main(["export", str(run), "--to", "hf", str(out)]) == 0
    options = {"trust_remote_code": True, "device": "cpu", "dtype": "float32", "batch_size": 2}
    theirs = HFLM(pretrained=str(out), **options)
    manifest = load_manifest(corpus)
    ours = RunModel(model, Tokenizer.load(corpus / manifest.tokenizer.file), batch=3)

    pairs = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]]
    found = ours.loglikelihood(requests("loglikelihood", pairs))
    expected = theirs.loglikelihood(requests("loglikelihood", pairs))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    likelihoods = torch.tensor([value for value, _ in found])
    assert likelihoods.std() > 1  # not a comparison of zeros
    torch.testing.assert_close(
        likelihoods, torch.tensor([value for value, _ in expected]), atol=1e-4, rtol=0
    )

    texts = [(" ".join(q["question"] for q in QUESTIONS),), ("a = 1",)]
    theirs.add_bos_token = False  # else it counts the document's first token too
    torch.testing.assert_close(
        torch.tensor(ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts))),
        torch.tensor(theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts))),
        atol=1e-3,
        rtol=0,
    )
    theirs.add_bos_token = None

    settings = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    prompts = [(each["text"], settings) for each in BEGINNINGS]
    written = ours.generate_until(requests("generate_until", prompts))
    assert any(written)
    assert written == theirs.generate_until(requests("generate_until", prompts))

    with torch.no_grad():
        results = evaluate(theirs, load_tasks([str(each) for each in tasks], None, None))
    assert results
    command = ["lm-eval", str(run), "--batch", "2", "--include", str(tmp_path / "tasks")]
    assert main([*command, "--tasks", f"own_choice,{tasks[1]}"]) == 0
    file = run / "lm_eval" / "step-00000000.json"
    kept = json.loads(file.read_text())["tasks"]
    for name in ("own_choice", "own_until"):
        assert kept[name]["metrics"] == measured(name, results).metrics
    shown = capsys.readouterr().out.splitlines()
    accuracy = kept["own_choice"]["metrics"]["acc"]
    assert any(line.split()[:3] == ["own_choice", "acc", f"{accuracy:.4f}"] for line in shown)
    (line,) = map(json.loads, (run / "lm_eval.jsonl").read_text().splitlines())
    assert line["step"] == 0 and line["lm_eval/own_choice/acc"] == accuracy

    assert main([*command, "--tasks", "own_choice", "--limit", "2", "--fewshot", "1"]) == 0
    now = json.loads(file.read_text())["tasks"]
    assert now["own_until"] == kept["own_until"]
    facts = {"documents": 2, "of": len(QUESTIONS), "fewshot": 1}
    assert facts.items() <= now["own_choice"].items()


def test_texts_that_a_task_wants_sampled_are_the_same_with_the_same_seed(
    tmp_path: Path, corpus: Path
) -> None:
    _, model = made_run(tmp_path, corpus, ["setting=S4"])
    tokenizer = Tokenizer.load(corpus / load_manifest(corpus).tokenizer.file)
    settings = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 1.0, "top_k": 9}
    prompts = requests("generate_until", [("import", settings), ("x", settings)])
    first, again, other = (
        RunModel(model, tokenizer, batch=2, seed=seed).generate_until(prompts) for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"max_gen_toks": 64}, "generates 64 tokens .* but model.context is 64"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 0.9}, "generation_kwargs.top_p"),
    ],
)
def test_what_a_model_cannot_generate_is_said_before_it_begins(
    settings: dict, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        generation({"max_gen_toks": 8, **settings}, context=64)


def test_what_cannot_be_measured_is_one_clear_line(
    tmp_path: Path,
    corpus: Path,
    tasks: list[Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, _ = made_run(tmp_path, corpus, ["setting=S4"])

    def error(*words: str) -> str:
        capsys.readouterr()
        assert main(["lm-eval", str(run), *words]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "no/such.yaml: no such file" in error("--tasks", "no/such.yaml")
    assert "has no complete checkpoint of step 7; it has those of 0" in error(
        "--tasks", str(tasks[0]), "--step", "7"
    )
    assert "no such folder" in error("--tasks", "a", "--include", str(tmp_path / "no"))
    longer = write_task(tmp_path / "more", "longer", UNTIL.replace("12", "99"), BEGINNINGS)
    assert "generates 99 tokens" in error("--tasks", str(longer))
    broken = write_task(
        tmp_path / "more", "broken", CHOICE.replace("question", "absent"), QUESTIONS
    )
    assert "UndefinedError: 'absent' is undefined" in error("--tasks", str(broken))
    (tmp_path / "more" / "broken.jsonl").unlink()
    assert "--tasks: " in error("--tasks", str(broken))
    assert not (run / "lm_eval").exists() and not (run / "lm_eval.jsonl").exists()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'dnt-scale[eval]'" in error("--tasks", str(tasks[0]))


@pytest.mark.slow
def test_a_name_that_the_harness_has_not_gets_the_nearest(tmp_path: Path) -> None:
    """It reads thousands of files."""
    with pytest.raises(ConfigError, match=r"'hellaswagg' is no task.*did you mean hellaswag"):
        load_tasks(["hellaswagg"], None, None)
