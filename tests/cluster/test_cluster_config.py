"""Reading a cluster's YAML and overrides."""

from pathlib import Path

import pytest

from cluster.cluster_config import changed, load
from dnt_scale.config import ConfigError


@pytest.mark.parametrize(
    ("written", "minutes"),
    [("90", 90), ("1:00:00", 60), ("12:00:00", 720), ("30:00", 30), ("1-00:00:00", 1440), ("'2:00:00'", 120)],
)
def test_a_time_is_a_time_with_and_without_quotes(written: str, minutes: int, tmp_path: Path) -> None:
    """YAML takes 12:00:00 for the number 43200."""
    file = tmp_path / "site.yaml"
    file.write_text(f"time: {written}\n")
    assert load([f"cluster={file}"])[0].time == minutes
    site, rest = load(["cluster=sandbox", f"cluster.time={written}", "run.name=x"])
    assert (site.time, rest) == (minutes, ["run.name=x"])
    assert changed(site, [f"cluster.time={written}"]).time == minutes


def test_overrides_are_yaml() -> None:
    site, _ = load(
        ["cluster=sandbox", "cluster.exclude=[n1,n2]", "cluster.nodelist=gpu[1-2,7]", "cluster.sbatch.gres=a:1"]
    )
    assert (site.exclude, site.nodelist, site.sbatch) == (["n1", "n2"], "gpu[1-2,7]", {"gres": "a:1"})
    with pytest.raises(ConfigError, match=r"cluster\.exclude: \[n1 cannot be read; write a list as \[a,b\]"):
        load(["cluster=sandbox", "cluster.exclude=[n1"])
    with pytest.raises(ConfigError, match=r"cluster\.nodes_: no such field"):
        load(["cluster=sandbox", "cluster.nodes_=3"])
