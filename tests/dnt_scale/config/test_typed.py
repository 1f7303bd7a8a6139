"""What was typed is the value: names and paths in overrides and YAML files, and the advice where
one cannot be read.
"""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from cluster import cluster_config as cluster_settings
from dnt_scale.config import (
    ConfigError,
    RunConfig,
    changed,
    config_dir,
    from_yaml,
    load,
    to_yaml,
    typed,
    validate,
)
from dnt_scale.sweep.combinations import expand_sweep

MINIMAL = ["run.name=try", "data.path=shards"]
# what Hydra or YAML takes for a number, a truth value, nothing, a date or a time
NAMES = (
    "1.1 1.10 1_0 2024_01_15 2024-01-15 12e456 3e5 67217e15 007 0x10 0b1 0o7 1e3 nan inf true True "
    "yes no off null"
)
PATHS = [
    "/tmp/données/set",
    "/数据/语料",
    "/lr=1e-3/set",
    "/a(b)/set",
    "/a&b",
    "/a,b",
    "/a b",
    "/a%b",
    "/[v1]/{x}",
    "/a#b:c@d",
    """/it's "it\"""",
    "/$HOME/${HOME}/${",
    "/back\\slash\\",
    "/trail ",
    " lead",
    ".hidden.",
    "a=b",
    "-x",
    "1.10",
    "true",
    "/tab\tline\nfeed",
    "choice(a,b)",
    "[a, b]",
]


def run(*overrides: str) -> RunConfig:
    return load([*MINIMAL, *overrides])


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES.split())
def test_a_name_is_the_text_that_was_typed(name: str) -> None:
    config = run(
        f"run.name={name}",
        f"model.name={name}",
        f"tracking.experiment={name}",
        "checkpoint.dir=c/${run.name}",
    )
    assert (config.run.name, config.run.dir, config.checkpoint.dir) == (
        name,
        Path(f"runs/{name}"),
        f"c/{name}",
    )
    assert (config.model.name, config.tracking.experiment) == (name, name)


def mixed(paths: list[str]) -> list[str]:
    """Overrides of a mixture of sets s0, s1, ... at these paths."""
    sets = [
        f"data.mixture.s{n}.{part}"
        for n, path in enumerate(paths)
        for part in (f"path={path}", "weight=1")
    ]
    return ["data=mixture", "data.path=null", *sets]


def test_a_path_is_the_text_that_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = run(*mixed(PATHS))
    for n in range(0, len(PATHS), 3):
        config = run(*mixed(PATHS), f"run.dir={PATHS[n]}", f"checkpoint.dir={PATHS[n - 1]}")
        assert (config.run.dir, config.checkpoint.dir) == (Path(PATHS[n]), PATHS[n - 1])
        assert [entry.path for entry in config.data.mixture.values()] == [
            Path(path).absolute() for path in PATHS
        ]
        (tmp_path / "config.yaml").write_text(to_yaml(config), "utf-8")
        assert from_yaml(tmp_path / "config.yaml") == config


def test_a_home_is_expanded_and_a_url_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = run("data.path=~/set", "run.dir=~/runs/${run.name}", "checkpoint.dir=~/c")
    assert (config.data.path, config.run.dir) == (Path("/home/me/set"), Path("/home/me/runs/try"))
    assert config.checkpoint.dir == "/home/me/c"
    root = os.path.expanduser("~root")  # noqa: PTH111
    assert run("data.path=~root/set").data.path == Path(root, "set")
    assert run("data.path=~no-such-user/set").data.path == Path("~no-such-user/set").absolute()
    assert run("data.path=./~").data.path == Path("~").absolute()
    for url in ("file:///a b/~", "s3://bucket/~/x", "memory://é"):
        assert run(f"checkpoint.dir={url}").checkpoint.dir == url
        assert "found a URL" in refused(f"data.path={url}") and "found a URL" in refused(
            f"run.dir={url}"
        )


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_for_hydra_mean_what_they_did(
    quote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = f"{quote}a (b){quote}"
    assert (
        run(f"data.path={path}", f"run.name={quote}1.10{quote}").data.path
        == Path("a (b)").absolute()
    )
    # no text of Hydra's
    assert run(f"data.path={path}{path}").data.path == Path(path + path).absolute()
    Path(path).mkdir()
    assert run(f"data.path={path}").data.path == Path(path).absolute()


def test_null_is_nothing_only_where_nothing_may_be() -> None:
    assert run("checkpoint.dir=null").checkpoint.dir is None
    assert run("checkpoint.dir='null'").checkpoint.dir == "null"
    assert run("run.name=null", "run.dir=null").run.dir == Path("null")


def test_only_references_are_replaced() -> None:
    config = run(
        "run.dir=/x/${run.name}/${oc.env:NO_SUCH_VARIABLE,${model.name}}/${seed}/$run.name/${run.name"
    )
    assert config.run.dir == Path("/x/try/dnt_124m/${seed}/$run.name/${run.name")


def test_names_in_a_mapping_are_text_too() -> None:
    given_ = (
        "data.mixture={1.10: {path: 2024_01_15, weight: 1e3}, true: {path: 'a (b)', weight: 1}}"
    )
    mixture = run(
        "data=mixture", "data.path=null", given_, "data.mixture.2024-01-15.path=007", DASHED
    ).data.mixture
    assert {name: (entry.path.name, entry.weight) for name, entry in mixture.items()} == {
        "1.10": ("2024_01_15", 1000),
        "true": ("a (b)", 1),
        "2024-01-15": ("007", 2),
    }
    assert run("optim.groups.x={pattern: 1.10, lr: 1e-1}").optim.groups["x"].pattern == "1.10"


ANY_TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
)
DASHED = "data.mixture.2024-01-15.weight=2"


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(ANY_TEXT, min_size=1, max_size=30))
def test_any_text_at_all_is_a_path(texts: list[str]) -> None:
    paths = [f"/x/{text}" for text in texts if "${" not in text]
    found = run(*mixed(paths or ["/x"])).data.mixture.values()
    assert [entry.path for entry in found] == [Path(path) for path in paths or ["/x"]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(["path", "list"]),
)
def test_a_text_in_yaml_is_the_one_that_was_dumped(text: str, place: str) -> None:
    tree: dict[str, Any] = (
        {"run": {"dir": text}} if place == "path" else {"data": {"mixture": {text: {"path": text}}}}
    )
    assert typed.read_yaml(yaml.dump(tree, Dumper=typed.Dumper), (RunConfig,)) == tree


def test_what_no_file_can_hold_is_refused() -> None:
    for text in ("a\0b", "a\udcffb", "\ud800"):
        for key in ("data.path", "run.name", "tracking.experiment", "optim.lr", "no.key"):
            assert key in refused(f"{key}={text}")
        assert "cluster.account" in refused_cluster(f"cluster.account={text}")


# --- numbers --------------------------------------------------------------------------------------


WHOLE = ["1e3", "1000", "1_000", "01000", "1000.0", "'1e3'", "+1000"]
NOT_WHOLE = ["true", "2e70", str(2**70), "0x10", "1:30", "1.5", "nan", "-1", "ten", "", "9" * 5000]
NOT_FINITE = ["true", "nan", ".inf", "1e400", "é", "(1)", "on"]
COUNTS = ["train.steps", "eval.rows", "checkpoint.keep", "health.snapshot_every"]


def test_a_whole_number_however_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "preset.yaml"
    for written in WHOLE:
        file.write_text(f"train: {{steps: {written}}}\nmodel: {{ffn_multiple: {written}}}\n")
        config = run(f"preset={file}", f"eval.rows={written}", f"checkpoint.keep={written}")
        found = (
            config.train.steps,
            config.model.ffn_multiple,
            config.eval.rows,
            config.checkpoint.keep,
        )
        assert found == (1000, 1000, 1000, 1000), written


@pytest.mark.parametrize("number", NOT_WHOLE)
def test_what_is_no_number_in_its_bounds_is_one_line(number: str, tmp_path: Path) -> None:
    nano = (config_dir() / "model/dnt_nano.yaml").read_text()
    (tmp_path / "model.yaml").write_text(nano + f"ffn_multiple: {number}\n")
    message = refused(f"model={tmp_path / 'model.yaml'}", *(f"{key}={number}" for key in COUNTS))
    assert all(f"{key}: " in message for key in [*COUNTS, "model.ffn_multiple"]), message


@pytest.mark.parametrize("number", NOT_FINITE)
def test_what_is_no_finite_number_is_one_line(number: str) -> None:
    floats = ["optim.lr", "health.hang_s", "optim.schedule.final"]
    betas = [] if number in ("é", "(1)") else [f"optim.betas=[0.9,{number}]"]
    message = refused("optim=adamw", *betas, *(f"{key}={number}" for key in floats))
    assert all(f"{key}" in message for key in [*floats, *("optim.betas" for _ in betas)]), message


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a model, NAME where a user gives one."""
    found = []
    for name, field in model.model_fields.items():
        for kind in typed.kinds(field.annotation):
            inner = kind if isinstance(kind, type) else None
            key = f"{prefix}{name}"
            if typed.get_origin(kind) is dict:
                inner, key = typed.get_args(kind)[1], f"{key}.NAME"
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found += keys(inner, f"{key}.")
            found.append(key)
    return found


KEYS = sorted(set(keys(RunConfig)))
CLUSTER_KEYS = sorted(set(keys(cluster_settings.ClusterConfig)))
VALUES = st.one_of(
    st.text(max_size=15),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        [
            "",
            "null",
            "true",
            "[]",
            "{}",
            "[1",
            "{a: b}",
            "{path: /a(b), weight: 1}",
            "1e999",
            "???",
            "${",
            "~",
        ]
    ),
    st.sampled_from(
        [
            str(2**70),
            "[" * 200,
            "a" * 5000,
            "\0",
            "\udcff",
            "*a",
            "&a",
            "!!python/name:os.system",
            "a,b",
        ]
    ),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(KEYS), VALUES, st.sampled_from(["", "+", "++", "~"]))
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(
    key: str, value: str, prefix: str
) -> None:
    try:
        config = run(f"{prefix}{key}={value}")
        assert validate(yaml.safe_load(to_yaml(config))) == config
    except ConfigError as error:
        assert str(error) and "\n" not in str(error).strip()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(CLUSTER_KEYS), VALUES)
def test_any_value_of_any_key_of_a_cluster_too(key: str, value: str) -> None:
    try:
        site, rest = cluster_settings.read_cluster(["cluster=sandbox", f"cluster.{key}={value}"])
        assert rest == [] and cluster_settings.change_cluster(site, []) == site
    except ConfigError as error:
        assert str(error) and "\n" not in str(error).strip()


# --- advice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given_",
    [
        "data.mixture.docs={path: /a(b), weight: 2}",
        "data.mixture={docs: {path: /données/lr=1, weight: 2}, code: {path: '/a b', weight: 0.5}}",
        "optim.groups.x={pattern: w_(q|k), lr: 1}",
        """optim.groups.x={pattern: ["']é$, lr: 1}""",
        "optim.groups={x: {pattern: [qk]_(proj), lr: 1}}",
    ],
)
def test_the_quoting_that_a_message_shows_works_in_a_shell(given_: str) -> None:
    base = (
        ["run.name=x", "data.path=d", "engine=zero1"]
        if "mixture" not in given_
        else ["run.name=x", "data=mixture"]
    )
    with pytest.raises(ConfigError) as caught:
        load([*base, given_])
    message = str(caught.value)
    assert message.startswith(f"{given_}: has to be quoted inside too")
    shown = message.rpartition("/-.+_: ")[2]
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {shown}"], capture_output=True, text=True
    ).stdout.split("\0")
    assert len(words) == 2 and not words[1]
    config = load([*base, words[0]])
    text = to_yaml(config)
    assert any(
        part in str(yaml.safe_load(text))
        for part in ("/a(b)", "/données/lr=1", "w_(q|k)", "é", "[qk]_(proj)")
    )


def test_a_path_in_a_shell_needs_quotes_of_the_shell_only() -> None:
    words = " ".join(map(shlex.quote, mixed(PATHS)))
    found = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, text=True
    ).stdout
    entries = run(*found.split("\0")[:-1]).data.mixture.values()
    assert [entry.path for entry in entries] == [Path(path).absolute() for path in PATHS]


# --- YAML files -----------------------------------------------------------------------------------


def test_a_file_of_a_group_is_given_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("both.yaml").write_text(
        "path: null\nmixture:\n  1.10: {path: 2024_01_15, weight: 0.7}\n  no: {path: ~/é (1), "
        "weight: 3e-1}\n"
    )
    expected = {"1.10": (tmp_path / "2024_01_15", 0.7), "no": (tmp_path / "é (1)", 0.3)}
    for word in ("./both.yaml", "both.yaml", str(tmp_path / "both.yaml"), "~/both.yaml"):
        mixture = load(["run.name=x", f"data={word}"]).data.mixture
        assert {name: (entry.path, entry.weight) for name, entry in mixture.items()} == expected
    Path("mine (é).yml").write_text(
        (config_dir() / "model/dnt_nano.yaml").read_text().replace("dnt_nano", "1_0")
    )
    config = load(
        [
            "run.name=x",
            "data=./both.yaml",
            "model=./mine (é).yml",
            "model.layers=2",
            "data.mixture.no.weight=2",
        ]
    )
    assert (config.model.name, config.model.layers, config.data.mixture["no"].weight) == (
        "1_0",
        2,
        2,
    )


@pytest.mark.parametrize("name", [*NAMES.split(), "1:30:00", "0012", "1.0", "2024-01-15"])
def test_a_text_without_quotes_is_the_text_in_every_file(name: str, tmp_path: Path) -> None:
    """Null is nothing in YAML, but where there has to be something."""
    valid = name if ":" not in name else "x"
    preset = (
        f"defaults: [{{override /model: dnt_nano}}]\nrun: {{name: {valid}, dir: {name}}}\ndata: "
        f"{{path: {name}}}\n"
    )
    (tmp_path / "preset.yaml").write_text(
        preset + f"model: {{name: {name}}}\ncheckpoint: {{dir: {name}}}\n"
    )
    (tmp_path / "site.yaml").write_text(
        f"partition: {name}\naccount: {name}\nnodelist: {name}\nexclude: [{name}]\nsetup: "
        f"[{name}]\ntime: 4:00:00\n"
        f"sbatch: {{begin: {name}, {name}: x}}\n"
    )
    if name != "null":  # of data.path and checkpoint.dir
        config = load([f"preset={tmp_path / 'preset.yaml'}"])
        again = tmp_path / "config.yaml"
        again.write_text(to_yaml(config).replace(f"name: '{name}'", f"name: {name}"))
        for found in (config, from_yaml(again)):
            assert (found.run.name, str(found.run.dir), found.model.name) == (valid, name, name)
            assert (found.checkpoint.dir, found.data.path) == (name, Path(name).absolute())
    site, _ = cluster_settings.read_cluster([f"cluster={tmp_path / 'site.yaml'}"])
    null = None if name == "null" else name
    assert (site.partition, site.account, site.nodelist, site.time) == (null, null, null, 240)
    assert (site.exclude, site.setup) == ([name], [name])
    assert site.sbatch == {"begin": True if name.lower() == "true" else name, name: "x"}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    for content in (
        b"a: [1",
        b"\xff\xfe",
        b"a: &a [*a]",
        b"a: 1\na: 2",
        b"[" * 1500,
        b"a: !!python/name:os.system x",
    ):
        file.write_bytes(content)
        assert f"{file}: not readable as YAML" in refused(f"model={file}")
        assert f"{file}: not readable as YAML" in refused_cluster(f"cluster={file}")
    for content in (b"- 1", b"x", b""):
        file.write_bytes(content)
        assert refused(f"model={file}") and refused_cluster(f"cluster={file}")
    assert f"model={tmp_path}: a folder" in refused(f"model={tmp_path}")
    assert "no such file; expected a YAML file, or one of ddp" in refused(
        f"engine={tmp_path}/none.yaml"
    )


# --- the cluster, and what goes on ----------------------------------------------------------------


def refused_cluster(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        cluster_settings.read_cluster(
            [*overrides] if overrides[0].startswith("cluster=") else ["cluster=sandbox", *overrides]
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", [*NAMES.split(), "0012", "a=b (é), c", "gpu[1-2,7]", "$HOME", "${HOME}"]
)
def test_words_for_slurm_are_the_text_that_was_typed(name: str) -> None:
    words = [
        "partition",
        "account",
        "qos",
        "nodelist",
        "constraint",
        "sbatch.comment",
        "sbatch.mem-per-cpu",
    ]
    site, _ = cluster_settings.read_cluster(
        ["cluster=sandbox", *(f"cluster.{key}={name}" for key in words)]
    )
    again = cluster_settings.change_cluster(site, ["cluster.nodes=1"])
    for found in (site, again, type(site).model_validate_json(site.model_dump_json())):
        expected = None if name == "null" else name
        assert {found.partition, found.account, found.qos, found.nodelist, found.constraint} == {
            expected
        }
        flag = True if name == "true" else name
        assert found.sbatch == {"comment": flag, "mem-per-cpu": flag}
    assert cluster_settings.change_cluster(site, [f"cluster.qos={name}"]) == site


def test_a_home_is_expanded_for_a_cluster_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "site é.yaml").write_text(
        "time: 90\nshared: [~/data, /x]\npython: ~/v/bin/python\nsetup: ['. ${HOME}/x']\n"
    )
    site, _ = cluster_settings.read_cluster(["cluster=~/site é.yaml"])
    assert (site.shared, site.python) == (
        [tmp_path / "data", Path("/x")],
        f"{tmp_path}/v/bin/python",
    )
    assert (site.setup, site.time) == ([". ${HOME}/x"], 90)


def test_a_run_that_goes_on_takes_text_as_it_was_typed(tmp_path: Path) -> None:
    begun = run("run.name=1.10", "data.path=/a ${b/c", "checkpoint.dir=true")
    for path in PATHS:
        again = changed(
            begun, [f"data.path={path}", "train.tokens=4e9", "checkpoint.dir=c/${run.name}"]
        )
        assert (again.run.name, again.data.path) == ("1.10", Path(path).absolute())
        assert (again.train.tokens, again.checkpoint.dir) == (4_000_000_000, "c/1.10")
    assert changed(begun, []) == begun
    with pytest.raises(ConfigError, match=r"optim\.lr: "):
        changed(begun, ["optim.lr=true"])
    with pytest.raises(ConfigError, match=r"has to be quoted inside too.*'optim.groups"):
        changed(begun, ["optim.groups.x={pattern: (a|b), lr: 1}"])


def test_a_sweep_splits_text_at_commas_and_leaves_it_as_it_is(tmp_path: Path) -> None:
    found, runs = expand_sweep(
        [*MINIMAL, f'data.path={tmp_path}/a(b),"{tmp_path}/c,d"', "model.name=1.10,007"]
    )
    assert [(each.data.path, each.model.name) for each in runs] == [
        (tmp_path / path, name) for path in ("a(b)", "c,d") for name in ("1.10", "007")
    ]
    assert found.runs[3].values == {"data.path": f"{tmp_path}/c,d", "model.name": "007"}
    assert found.runs[3].name.endswith("c_d-name_007")
    named, _ = expand_sweep([*MINIMAL, "run.name=1.10", "optim.lr=1,2"])
    assert named.name == "1.10"
