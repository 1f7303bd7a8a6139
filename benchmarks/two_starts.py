"""Start two trainings of one run folder, over and over: one must train undisturbed, the other leave
with a line.

    python benchmarks/two_starts.py --data SET [--pairs 30] [--submitted]

The second starts 0 to 5 s after the first, at random. With --submitted one of the two is `dnt
submit cluster=sandbox` (`dnt sandbox up` before), first in every other pair. SET is any prepared
set with a validation split. Prints a line a pair, and ends with status 1 when any was wrong.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DNT = Path(sys.executable).with_name("dnt")
STEPS = 60
RUN = [
    "model=dnt_nano",
    "model.layers=2",
    "model.width=64",
    "model.heads=2",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.dtype=fp32",
    f"train.steps={STEPS}",
    "optim.schedule.warmup_steps=2",
    "eval.rows=4",
    "eval.every=10",
    "checkpoint.every=20",
    "tracking.enabled=false",
    "run.device=cpu",
]


def start(command: str, run_dir: Path, given: list[str]) -> subprocess.Popen[str]:
    words = [DNT, command, f"run.name={run_dir.name}", f"run.dir={run_dir}", *RUN, *given]
    words += ["cluster=sandbox"] if command == "submit" else []
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps(run_dir: Path) -> list[int]:
    file = run_dir / "metrics.jsonl"
    return (
        [json.loads(line)["step"] for line in file.read_text().splitlines()]
        if file.exists()
        else []
    )


def pair(commands: tuple[str, str], run_dir: Path, given: list[str], offset: float) -> str:
    """Start both, wait for both, and return what was wrong, "" when nothing was."""
    first = start(commands[0], run_dir, given)
    time.sleep(offset)
    second = start(commands[1], run_dir, given)
    said = [process.communicate()[1].splitlines() for process in (first, second)]
    codes = [first.returncode, second.returncode]
    if sorted(codes) != [0, 2]:
        return f"exit codes {codes}: {said}"
    until = time.monotonic() + 180
    # a submitted one goes on after its command
    while len(steps(run_dir)) <= STEPS and time.monotonic() < until:
        time.sleep(0.2)
    if steps(run_dir) != list(range(STEPS + 1)):
        return f"metrics.jsonl has the steps {steps(run_dir)}"
    told = said[codes.index(2)]
    return (
        ""
        if len(told) == 1 and told[0].startswith("error: run.dir: ")
        else f"the second said {told}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", required=True, type=Path, help="a prepared set with a validation split"
    )
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--submitted", action="store_true", help="one of the two by `dnt submit`")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    manifest = json.loads((options.data / "manifest.json").read_text())
    given = [f"data.path={options.data.absolute()}", f"model.context={manifest['seq_len']}"]
    given.append(f"model.vocab_size={manifest['tokenizer']['vocab_size']}")
    offsets, wrong = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory(prefix="two-starts-") as folder:
        for number in range(options.pairs):
            commands = ("train", "submit" if options.submitted else "train")
            if number % 2:
                commands = (commands[1], commands[0])
            offset = offsets.uniform(0, 5)
            trouble = pair(commands, Path(folder, f"run-{number}"), given, offset)
            wrong += bool(trouble)
            print(
                f"{number:3d}  {' then '.join(commands)}, {offset:.2f} s apart: "
                f"{trouble or 'as it should be'}",
                flush=True,
            )
    print(f"{options.pairs - wrong} of {options.pairs} pairs as they should be")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
