"""Write the runs of this folder, which another commit goes on with
(tests/dnt_scale/checkpoint/test_old_runs.py).

`PYTHONPATH=A_CHECKOUT_OF_c4e2237 python make_runs.py OUT`. OUT was then written as /srv/runs in
config.yaml and state.json, OUT/NAME-whole/metrics.jsonl became NAME.jsonl, and the rest of
OUT/NAME-whole was left out.
"""

import os
import subprocess
import sys
from pathlib import Path

RUNS = {
    "ddp-msgdw": ["engine=ddp", "optim=msgdw"],
    "fsdp-msgdw": ["engine=fsdp", "optim=msgdw_r"],
    "fsdp-bf16-momentum": [
        *("engine=fsdp", "optim=msgdw"),
        *("optim.momentum_dtype=bf16", "optim.gradient_buffer=false", "optim.clip=tensor"),
    ],
    "hsdp-msgdw": ["engine=hsdp", "engine.replicas=2", "optim=msgdw"],
    "zero0-msgdw": ["engine=zero0", "optim=msgdw"],
    "zero1-msgdw": ["engine=zero1", "optim=msgdw_r"],
    "zero2-adamw": ["engine=zero2", "optim=adamw"],
    "zero3-msgdw": ["engine=zero3", "optim=msgdw"],
}
TINY = [
    *("model=dnt_nano", "model.layers=1", "model.width=16", "model.heads=2"),
    *("model.vocab_size=512", "model.context=64", "optim.schedule.warmup_steps=2"),
    *("train.steps=6", "train.global_batch=4", "train.micro_batch=1", "train.dtype=fp32"),
    *("eval.every=3", "eval.rows=4", "checkpoint.every=3", "checkpoint.background=false"),
    *("tracking.enabled=false", "run.device=cpu"),
]
RANK = """
import os, signal, sys
from dnt_scale import tracking, train
log = tracking.Tracker.log
def log_and_die(self, metrics):
    log(self, metrics)
    if metrics["step"] == 5 and os.environ.get("KILLED"):
        os.killpg(0, signal.SIGKILL)
tracking.Tracker.log = log_and_die
sys.exit(train.main(sys.argv[1:]))
"""


def on_two_ranks(overrides: list[str], *, killed: bool) -> int:
    """Train in a process group of its own, which dies after step 5 where it is to be `killed`."""
    env = {
        **os.environ,
        "RANK_SCRIPT": RANK,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29777",
        "KILLED": "1" if killed else "",
    }
    start = f'RANK={{0}} LOCAL_RANK={{0}} {sys.executable} -c "$RANK_SCRIPT" "$@" &\n'
    script = start.format(0) + start.format(1) + "wait"
    return subprocess.run(
        ["bash", "-c", script, "bash", *overrides], env=env, start_new_session=True
    ).returncode


if __name__ == "__main__":
    from testbed.run import synthetic_set

    out = Path(sys.argv[1]).absolute()
    out.mkdir(parents=True)
    data = synthetic_set(out / "set")
    for name, choices in RUNS.items():
        for killed in (False, True):
            folder = out / (name if killed else f"{name}-whole")
            where = [f"run.name={name}", f"run.dir={folder}", f"data.path={data}"]
            print(name, killed, on_two_ranks([*TINY, *choices, *where], killed=killed), flush=True)
