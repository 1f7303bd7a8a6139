"""Reading a cluster's YAML and overrides."""

from pathlib import Path

import pytest

from cluster.cluster_config import change_cluster, read_cluster, split_overrides
from dnt_scale.config import ConfigError


@pytest.mark.parametrize(
    ("written", "minutes"),
    [
        ("90", 90),
        ("1:00:00", 60),
        ("12:00:00", 720),
        ("30:00", 30),
        ("1-00:00:00", 1440),
        ("'2:00:00'", 120),
    ],
)
def test_a_time_is_a_time_with_and_without_quotes(
    written: str, minutes: int, tmp_path: Path
) -> None:
    """YAML takes 12:00:00 for the number 43200."""
    file = tmp_path / "site.yaml"
    file.write_text(f"time: {written}\n")
    assert read_cluster([f"cluster={file}"])[0].time == minutes
    site, rest = read_cluster(["cluster=sandbox", f"cluster.time={written}", "run.name=x"])
    assert (site.time, rest) == (minutes, ["run.name=x"])
    assert change_cluster(site, [f"cluster.time={written}"]).time == minutes


def test_overrides_have_the_grammar_of_a_run_s() -> None:
    site, _ = read_cluster(
        [
            "cluster=sandbox",
            "cluster.exclude=[n1,n2]",
            "++cluster.nodelist=gpu[1-2,7]",
            "+cluster.sbatch.gres=a:1",
            "cluster.sbatch.exclusive=true",
            "cluster.mem_gb=1e2",
            "cluster.setup=['module load cuda',\"export A='b c'\"]",
            "~cluster.partition",
        ]
    )
    assert (site.exclude, site.nodelist, site.partition) == (["n1", "n2"], "gpu[1-2,7]", None)
    assert (site.sbatch, site.mem_gb) == ({"gres": "a:1", "exclusive": True}, 100.0)
    assert site.setup == ["module load cuda", "export A='b c'"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.exclude=[n1", r"cluster\.exclude: \[n1 cannot be read; write a list as \[a,b\]"),
        ("cluster.nodes_=3", r"cluster\.nodes_: no such field; did you mean cluster\.nodes\?"),
        (
            "cluster.nodes=1,2",
            r"cluster\.nodes=1,2: several values are a sweep, .*; give one value",
        ),
        ("cluster.nodes", r"cluster\.nodes: expected cluster\.KEY=VALUE"),
        ("~cluster.qos", r"~cluster\.qos: there is no cluster\.qos to remove; leave it out"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_cluster(["cluster=sandbox", override])


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("setup=[source /x && y]", "setup", ["source /x && y"]),
        ("setup=['it''s']", "setup", ["it's"]),
        ("setup=- a", "setup", ["a"]),
        ("exclude=[n1, n2,]", "exclude", ["n1", "n2"]),
        (
            "sbatch={gres: gpu:2, exclusive: True, nice: 5}",
            "sbatch",
            {"gres": "gpu:2", "exclusive": True, "nice": "5"},
        ),
        ("sbatch=gres: gpu:2", "sbatch", {"gres": "gpu:2"}),
        ("sbatch.comment=", "sbatch", {"comment": ""}),
        ("ranks_per_node=", "ranks_per_node", None),
        ("ranks_per_node=~", "ranks_per_node", None),
        ("requeue=off", "requeue", False),
        ("nodes=1_000", "nodes", 1000),
    ],
)
def test_what_was_taken_as_yaml_still_is(override: str, field: str, value: object) -> None:
    """These are no values of Hydra's grammar, or would be text there."""
    assert getattr(read_cluster(["cluster=sandbox", f"cluster.{override}"])[0], field) == value


def test_a_submitted_run_takes_the_same_overrides(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("partition: other\ntime: 90\nnodes: 4\n")
    site, _ = read_cluster(["cluster=sandbox", "cluster.setup=['${HOME}/x']"])
    assert change_cluster(site, []) == site
    changed = change_cluster(site, ["+cluster.nodes=3", "~cluster.cpus_per_rank"])
    assert (changed.nodes, changed.cpus_per_rank, changed.setup) == (3, None, ["${HOME}/x"])
    other = change_cluster(site, [f"cluster={tmp_path}/other.yaml", "cluster.time=60"])
    assert (other.partition, other.nodes, other.time, other.setup) == ("other", 4, 60, [])


def test_overrides_are_the_cluster_s_or_the_run_s() -> None:
    given = [
        "+cluster.nodes=1",
        "optim.lr=1",
        "cluster=x",
        "~cluster.qos",
        "clusters.a=1",
        "data.path=cluster.x",
    ]
    assert split_overrides(given) == (
        ["+cluster.nodes=1", "cluster=x", "~cluster.qos"],
        ["optim.lr=1", "clusters.a=1", "data.path=cluster.x"],
    )
