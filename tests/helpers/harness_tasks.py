"""Tasks of lm-evaluation-harness that are made here, of files alone."""

import json
from pathlib import Path

QUESTIONS = [
    {"question": "import", "choices": [" os", " sys", "\n"], "answer": 1},
    {"question": "def ", "choices": ["main(", "f(x):"], "answer": 0},
    {"question": "x = 'größe', ", "choices": ["1", "22", "333"], "answer": 2},
    {"question": "return self.value " * 9, "choices": [" + 1", "\n"], "answer": 0},
    {"question": "", "choices": ["class", "if a:\n"], "answer": 1},
]
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def write_task(folder: Path, name: str, text: str, documents: list[dict]) -> Path:
    """Write a task's data and its YAML file, and return the latter."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    file = folder / f"{name}.yaml"
    cache = folder / "cache"
    file.write_text(
        f"task: {name}\ndataset_path: json\nvalidation_split: validation\n"
        f"dataset_kwargs: {{cache_dir: {cache}, data_files: {{validation: {data}}}}}\n{text}"
    )
    return file
