"""docs/extend/cluster.md as it stands: its files put where it says, its commands and tests run."""

import re
import shlex
import shutil
from pathlib import Path
from textwrap import indent

import pytest

from cluster.cluster_config import change_cluster, read_cluster, split_overrides
from cluster.submit import single_run
from testbed.run import python

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extend" / "cluster.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


[SITE] = blocks("yaml")
FIELD, CHECK, TEST = blocks("python")
# They stand inside of a class and of a function.
FIELD, CHECK = (indent(part, "    ") for part in (FIELD, CHECK))
COMMANDS = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    file = tmp_path / "pyxis.yaml"
    file.write_text(SITE)
    return file


def test_the_file_is_a_cluster(site: Path, tmp_path: Path) -> None:
    cluster, _ = read_cluster([f"cluster={site}"])
    assert (cluster.ranks, cluster.time, cluster.sbatch["exclusive"]) == (32, 1440, True)
    options = single_run.srun_options(cluster)
    assert "--container-image=/lustre/images/dnt.sqsh" in options
    assert "--container-mounts=/lustre:/lustre" in options
    assert "export NCCL_IB_HCA=mlx5" in single_run.setup_lines(tmp_path, cluster)


def test_its_commands_override_it(site: Path) -> None:
    def overrides(words: list[str]) -> list[str]:
        given = [word for word in words if "cluster" in word]
        ours, runs = split_overrides(given)
        assert runs == []
        return [word.replace("cluster=pyxis", f"cluster={site}") for word in ours]

    dry_run, reserved, resubmitted = COMMANDS
    assert read_cluster(overrides(dry_run))[0].nodes == 8
    cluster, _ = read_cluster(overrides(reserved))
    assert (cluster.partition, cluster.sbatch["reservation"]) == (None, "llm")
    assert change_cluster(cluster, overrides(resubmitted)).exclude == ["node7", "node9"]


@pytest.mark.slow
def test_the_new_key_is_read_and_checked(tmp_path: Path) -> None:
    """The packages with what the page adds, and the page's own test of it."""
    for name in ("dnt_scale", "data_prep", "cluster", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    [name] = re.findall(r"^# (\S+\.yaml)$", SITE, re.MULTILINE)
    (tmp_path / name).write_text(SITE)
    config, checks = tmp_path / "cluster/cluster_config.py", tmp_path / "cluster/submit/checks.py"
    source = config.read_text()
    end = source.index("    @model_validator")
    config.write_text(f"{source[:end]}{FIELD}\n{source[end:]}")
    source = checks.read_text()
    body = source.index('"""\n', source.index("def check_limits(")) + 4
    checks.write_text(source[:body] + CHECK + source[body:])
    (tmp_path / "test_key.py").write_text(
        "import pytest\n\n"
        "from cluster.cluster_config import read_cluster\n"
        "from cluster.slurm import Node, Partition\n"
        "from cluster.submit.checks import check_limits\n"
        f"from dnt_scale.config import ConfigError\n\n\n{TEST}"
    )
    words = ("-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_key.py"))
    assert "1 passed" in python(*words, env={"PYTHONPATH": str(tmp_path)}).ok().out
