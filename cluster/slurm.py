"""All that is asked of SLURM: its commands, run and read. Works with and without accounting
(sacct)."""

import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

TIMEOUT_S = 60.0
UNLIMITED = ("UNLIMITED", "INFINITE")
LIVE = (
    "PENDING",
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "SUSPENDED",
    "STOPPED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
)


class SlurmError(ValueError):
    """A SLURM command failed; the message holds its own words."""


@dataclass(frozen=True)
class Job:
    """A job, or one task of an array (``id`` is ARRAY_TASK then). Times in seconds since 1970; 0:
    there is none."""

    id: str
    state: str  # SLURM's word, such as PENDING, RUNNING, COMPLETED, CANCELLED, NODE_FAIL
    reason: str = ""
    nodes: str = ""  # as SLURM writes them: node[1-3]
    restarts: int = 0
    submitted: float = 0.0
    eligible: float = 0.0
    started: float = 0.0
    ends: float = 0.0  # when its time is up while it runs, else when it ended
    preempted: bool = False  # this start of it
    output: str = ""  # file of the batch script's output; empty where only accounting knows the job

    @property
    def live(self) -> bool:
        """Return whether it is in the queue or running, so that it may still change its run."""
        return self.state in LIVE


def run(*command: str) -> str:
    """Return the output of a SLURM command.

    Raises:
        SlurmError: there is no such command here, it failed, or did not answer within a minute.
    """
    done = _run_unchecked(command)
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())
        raise SlurmError(f"`{' '.join(command)}` failed: {words}")
    return done.stdout


def _run_unchecked(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    _check_command(command[0])
    try:
        # A user may have set SLURM_TIME_FORMAT otherwise.
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            env={
                **os.environ,
                "SLURM_TIME_FORMAT": "standard",
            },
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"`{' '.join(command)}` gave no answer within {TIMEOUT_S:.0f} s; is SLURM up?"
        ) from None


def check_here() -> None:
    """Raise SlurmError where there is no SLURM, or its controller does not answer."""
    for command in ("sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo"):
        _check_command(command)
    done = _run_unchecked(("scontrol", "ping"))  # fails where it is down
    if "is UP" not in done.stdout:
        words = " ".join((done.stdout or done.stderr).replace("*", "").split())
        raise SlurmError(f"SLURM's controller does not answer: {words}; try again when it is back")


def _check_command(name: str) -> None:
    if shutil.which(name) is None:
        raise SlurmError(
            f"no SLURM here: there is no `{name}` on PATH; run this on a login node, or try `dnt "
            "sandbox up`"
        )


def job(job_id: str) -> Job | None:
    """Return the job as it is now, else as it was, as long as SLURM remembers; None when it does
    not.

    The controller forgets a job some minutes after its end; accounting (sacct), where there is any,
    does not.
    """
    try:
        text = run("scontrol", "show", "job", "-o", job_id)
    except SlurmError as error:
        # the second for a task of an array that was cancelled in the queue
        if "Invalid job id" not in str(error) and "not found" not in str(error):
            raise
        return _from_sacct(job_id)
    return _from_scontrol(job_id, text.splitlines()[0])


def queue() -> dict[str, Job]:
    """Return this user's jobs that are in the queue or running, by id, each task of an array by
    itself. Raises SlurmError."""
    user = pwd.getpwuid(os.getuid()).pw_name
    columns = ",".join(f"{name}:{width}" for name, width in _QUEUE.items())
    found = {}
    for row in run("squeue", "-h", "-r", "-u", user, "-O", columns).splitlines():
        field, at = {}, 0
        for name, width in _QUEUE.items():
            field[name], at = row[at : at + width].strip(), at + width
        found[field["JobArrayID"]] = Job(
            id=field["JobArrayID"],
            state=field["State"],
            reason="" if field["Reason"] == "None" else field["Reason"],
            nodes=field["NodeList"],
            restarts=int(field["RestartCnt"]),
            submitted=_seconds(field["SubmitTime"]),
            eligible=_seconds(field["EligibleTime"]),
            started=_seconds(field["StartTime"]),
            ends=_seconds(field["EndTime"]),
            preempted=_seconds(field["PreemptTime"]) > 0,
            output=field["STDOUT"],
        )
    return found


_TIMES = ("SubmitTime", "EligibleTime", "StartTime", "EndTime", "PreemptTime")
# squeue's columns and their widths; no separator is safe in all of them
_QUEUE = {"JobArrayID": 64, "State": 32, "Reason": 128, "NodeList": 4096, "RestartCnt": 16}
_QUEUE |= {**dict.fromkeys(_TIMES, 24), "STDOUT": 4096}


def _from_scontrol(job_id: str, line: str) -> Job:
    field = _fields(line)
    return Job(
        id=job_id,
        state=field["JobState"],
        reason="" if field.get("Reason") == "None" else field.get("Reason", ""),
        nodes="" if field.get("NodeList") == "(null)" else field.get("NodeList", ""),
        restarts=int(field.get("Restarts", 0)),
        submitted=_seconds(field.get("SubmitTime", "")),
        eligible=_seconds(field.get("EligibleTime", "")),
        started=_seconds(field.get("StartTime", "")),
        ends=_seconds(field.get("EndTime", "")),
        preempted=field.get("PreemptTime", "None") not in ("None", "N/A", "Unknown"),
        output=field.get("StdOut", ""),
    )


def _from_sacct(job_id: str) -> Job | None:
    """Return the last run of a job as sacct has it, None without accounting."""
    columns = "JobID,State,NodeList,Submit,Eligible,Start,End"
    try:
        rows = run("sacct", "-n", "-P", "-X", "-D", "-j", job_id, "-o", columns).splitlines()
    except SlurmError:  # no accounting
        return None
    rows = [row for row in rows if row.split("|")[0] == job_id]
    if not rows:
        return None
    _, state, nodes, *times = rows[-1].split("|")
    submitted, eligible, started, ended = map(_seconds, times)
    nodes = "" if nodes == "None assigned" else nodes
    return Job(
        job_id, state.split()[0], "", nodes, len(rows) - 1, submitted, eligible, started, ended
    )


def _fields(line: str) -> dict[str, str]:
    """Read ``KEY=VALUE KEY=VALUE`` of `scontrol -o`, whose values may hold spaces."""
    return dict(re.findall(r"([\w/:&]+)=(.*?)(?= [\w/:&]+=|\s*$)", line))


def _seconds(time: str) -> float:
    """Return SLURM's local time as seconds since 1970, 0 for "Unknown", "N/A" and the like."""
    try:
        return datetime.fromisoformat(time).timestamp()
    except ValueError:
        return 0.0


@dataclass(frozen=True)
class Node:
    name: str
    state: str  # idle, mixed, allocated, down, drained, ... in lower case, without SLURM's flags
    cpus: int
    memory_mb: int
    gpus: int
    gpu: str = ""  # SLURM's type of them, such as h100; empty where the site gives none
    address: str = ""  # what the controller calls it by

    @property
    def able(self) -> bool:
        return self.state in ("idle", "mixed", "allocated", "completing", "reserved", "planned")


@dataclass(frozen=True)
class Partition:
    name: str
    up: bool
    default: bool
    max_minutes: int | None  # None: no limit
    max_nodes: int | None
    nodes: tuple[Node, ...]


def partitions() -> dict[str, Partition]:
    """Return what `scontrol show partition` and `sinfo` say, by name. Raises SlurmError."""
    nodes: dict[str, list[Node]] = {}
    for row in run("sinfo", "-h", "-N", "-o", "%R|%N|%T|%c|%m|%G|%o").splitlines():
        partition, name, state, cpus, memory, gres, address = row.split("|")
        gpus = re.findall(r"gpu(?::([^:,(]+))?:(\d+)", gres)
        node = Node(
            name=name,
            state=state.rstrip("*~#!%$@^-+"),
            cpus=int(cpus.rstrip("+")),
            memory_mb=int(memory.rstrip("+")),
            gpus=sum(int(count) for _, count in gpus),
            gpu=gpus[0][0] if gpus else "",
            address=address,
        )
        nodes.setdefault(partition, []).append(node)
    found = {}
    for line in run("scontrol", "show", "partition", "-o").splitlines():
        field = _fields(line)
        name = field["PartitionName"]
        limit, most = field.get("MaxTime", "UNLIMITED"), field.get("MaxNodes", "UNLIMITED")
        found[name] = Partition(
            name=name,
            up=field.get("State") == "UP",
            default=field.get("Default") == "YES",
            max_minutes=None if limit in UNLIMITED else minutes_of(limit),
            max_nodes=int(most) if most.isdigit() else None,
            nodes=tuple(nodes.get(name, ())),
        )
    return found


def accounts() -> tuple[set[str], set[str]]:
    """Return the accounts and the QOS that this user may ask for; empty where accounting (sacctmgr)
    does not say."""
    user = pwd.getpwuid(os.getuid()).pw_name
    try:
        rows = run(
            "sacctmgr", "-n", "-P", "show", "assoc", f"user={user}", "format=account,qos"
        ).splitlines()
    except SlurmError:
        return set(), set()
    columns = [row.split("|") for row in rows]
    return {account for account, _ in columns}, {
        name for _, qos in columns for name in qos.split(",") if name
    }


def expected_start(script: str) -> str:
    """Ask SLURM when and where a batch script would start if it were submitted now, in words; it is
    not submitted.

    Raises:
        SlurmError: SLURM would refuse it; the message holds its own words.
    """
    with tempfile.NamedTemporaryFile("w", prefix="dnt-", suffix=".sh") as file:
        file.write(script)
        file.flush()
        done = _run_unchecked(("sbatch", "--test-only", file.name))
    words = " ".join(done.stderr.split()).replace("sbatch: error: ", "").removeprefix("sbatch: ")
    if done.returncode:
        raise SlurmError(f"SLURM would refuse the job: {words}")
    found = re.search(r"to start at (\S+) .*on nodes (\S+)", words)
    return f"{found[1].replace('T', ' ')} on {found[2]}" if found else ""


def minutes_of(time: str) -> int:
    """Return a time in one of SLURM's formats (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) as minutes,
    rounded up. Raises ValueError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise ValueError("expected minutes, H:M:S, or D-H:M:S in quotes")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None or match[4] is not None:
        seconds = ((days * 24 + first) * 60 + second) * 60 + third
    else:
        seconds = first * 60 + second
    return -(-seconds // 60)


def hostnames(nodes: str) -> list[str]:
    """Return the names behind ``node[1-3,7]``. Raises SlurmError."""
    return run("scontrol", "show", "hostnames", nodes).split() if nodes else []


def requeue(job_id: str) -> None:
    """Put a running job back into the queue. Raises SlurmError where the site or the job does not
    permit that."""
    run("scontrol", "requeue", job_id)


def cancel(*job_ids: str) -> None:
    run("scancel", *job_ids)


def cluster_name() -> str:
    """Return the name of the SLURM that answers here; two may see the same folder. Raises
    SlurmError."""
    found = re.search(r"^ClusterName\s*=\s*(\S+)", run("scontrol", "show", "config"), re.MULTILINE)
    return found[1] if found else ""


def this_job() -> str:
    """Return the id of the job that this process is part of, ARRAY_TASK in an array."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def this_attempt() -> str:
    """Return JOB.RESTART, the name of this start of the job."""
    return f"{this_job()}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
