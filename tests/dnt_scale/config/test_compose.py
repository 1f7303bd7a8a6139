"""Composing and validating a run: what resolves, what is refused, and how the refusal reads."""

from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dnt_scale.config import (
    ConfigError,
    RunConfig,
    changed,
    config_dir,
    flat,
    from_yaml,
    load,
    to_yaml,
    validate,
)
from dnt_scale.optim.algorithms.adamw import AdamWConfig
from dnt_scale.optim.algorithms.msgdw import MSGDWConfig

MINIMAL = ["run.name=try", "data.path=shards"]
UNBUFFERED = ["optim.gradient_buffer=false", "optim.clip=tensor"]
GROUPS = ("model", "optim", "engine", "data", "tracking", "preset")


def run(*overrides: str) -> RunConfig:
    return load([*MINIMAL, *overrides])


def refused(*overrides: str, minimal: bool = True) -> str:
    with pytest.raises(ConfigError) as caught:
        load([*(MINIMAL if minimal else []), *overrides])
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- what resolves


def test_the_demo_preset_needs_nothing_more() -> None:
    config = load(["preset=demo"])
    assert (config.run.name, config.run.dir, config.data.path) == (
        "demo",
        Path("runs/demo"),
        Path("data/demo").absolute(),
    )
    assert (config.model.name, config.model.setting, config.train.tokens) == (
        "dnt_nano",
        "S4",
        None,
    )
    assert config.train.steps != run().train.steps  # the preset's own
    assert isinstance(config.optim, MSGDWConfig)
    assert config.optim.groups["matrices"].update == "row_column_normalized"
    assert config.optim.schedule.steps_of_warmup(400) == 20


def test_the_demo_of_images_needs_nothing_more() -> None:
    config = load(["preset=demo_images"])
    assert (config.run.name, config.model.name, config.data.path) == (
        "demo-images",
        "vdnt_tiny",
        Path("data/demo-images").absolute(),
    )
    assert isinstance(config.optim, MSGDWConfig) and config.data.size == config.model.image_size


def test_the_command_line_wins_over_the_preset_and_the_preset_over_the_defaults() -> None:
    config = load(
        ["preset=demo", "train.steps=7", "run.name=mine", "model.layers=2", "optim=adamw"]
    )
    assert (config.train.steps, config.run.name, config.run.dir) == (7, "mine", Path("runs/mine"))
    assert config.model.layers == 2 and config.model.name == "dnt_nano"
    assert isinstance(config.optim, AdamWConfig) and config.optim.lr == 6e-4


def test_the_defaults_are_the_papers_small_model() -> None:
    config = run()
    assert (
        config.model.name == "dnt_124m"
        and config.engine.name == "fsdp"
        and config.run.device == "auto"
    )
    assert config.train.global_batch * config.model.context == 491_520
    assert isinstance(config.optim, MSGDWConfig)
    assert (config.optim.lr, config.optim.momentum, config.optim.dampening) == (2e-3, 0.95, 0.95)
    vanilla = run("optim=msgdw").optim
    assert isinstance(vanilla, MSGDWConfig) and vanilla.dampening == 0 and not vanilla.groups


@pytest.mark.parametrize(
    "choice",
    [
        f"{group}={p.stem}"
        for group in GROUPS
        for p in sorted((config_dir() / group).glob("*.yaml"))
    ],
)
def test_every_file_in_configs_loads(choice: str) -> None:
    group, _, name = choice.partition("=")
    config = run(choice)
    if group in ("model", "engine"):
        assert getattr(config, group).name == name.removesuffix("_offload")
    if group == "optim":
        file = yaml.safe_load((config_dir() / "optim" / f"{name}.yaml").read_text())
        assert config.optim.algorithm == file["algorithm"]
        assert config.optim.groups.keys() == file["groups"].keys()


def test_no_config_file_is_left_out() -> None:
    folders = {path.name for path in config_dir().iterdir() if path.is_dir()}
    # which others read: config.augment, data_prep, cluster.cluster_config, and config.hardware
    assert folders - {"augment", "clean", "cluster", "hardware"} == set(GROUPS)


def test_a_budget_in_tokens_takes_the_place_of_one_in_steps_and_the_reverse() -> None:
    tokens = run("train.tokens=1000")
    assert (tokens.train.steps, tokens.train.tokens) == (None, 1000)
    steps = changed(tokens, ["train.steps=7"])
    assert (steps.train.steps, steps.train.tokens) == (7, None)


def test_keys_that_only_the_models_have_can_be_set() -> None:
    """They stand in no YAML file, so Hydra alone would refuse them; with and without its + and
    ++.
    """
    for prefix in ("", "+", "++"):
        assert run(f"{prefix}model.bias=true").model.bias is True
    config = run(
        "model.norm=layernorm",
        "model.activation=relu",
        "optim.groups.gains={pattern: gain, lr: 0.1}",
    )
    assert (config.model.norm, config.model.activation) == ("layernorm", "relu")
    assert config.optim.groups["gains"].lr == 0.1 and "matrices" in config.optim.groups


MIXTURE = [
    "data=mixture",
    "data.mixture.wiki={path: a, weight: 7}",
    "data.mixture.code={path: /b, weight: 0.3}",
]


def test_a_mixture() -> None:
    data = load(["run.name=x", *MIXTURE, "data.document_mask=true"]).data
    assert (data.path, data.document_mask) == (None, True)
    assert {name: (entry.path, entry.weight) for name, entry in data.mixture.items()} == {
        "wiki": (Path("a").absolute(), 7),
        "code": (Path("/b"), 0.3),
    }
    dotted = [
        "data.path=null",
        *(f"data.mixture.{k}" for k in ("wiki.path=a", "wiki.weight=7", "code.weight=0.3")),
    ]
    assert (
        load(["run.name=x", *dotted, "data.mixture.code.path=/b", "data.document_mask=true"]).data
        == data
    )
    assert load(["preset=demo", "data.path=null", *MIXTURE[1:]]).data.mixture == data.mixture


def test_a_run_from_before_there_were_mixtures_still_reads() -> None:
    raw = yaml.safe_load(to_yaml(run()))
    raw["data"] = {"path": "/shards"}
    data = validate(raw).data
    assert (data.path, data.mixture, data.document_mask) == (Path("/shards"), {}, False)


def test_interpolation_and_numbers() -> None:
    config = run(
        "run.dir=/scratch/${run.name}/${model.name}",
        "train.tokens=10e9",
        "train.steps=null",
        "optim.lr=1e-3",
    )
    assert config.run.dir == Path("/scratch/try/dnt_124m")
    assert config.train.tokens == 10_000_000_000 and isinstance(config.train.tokens, int)
    assert config.optim.lr == 0.001


@pytest.mark.parametrize("spike", ["off", "rollback"])
def test_without_a_gradient_buffer_a_spike_can_be_undone(spike: str) -> None:
    assert run("optim.nesterov=false", *UNBUFFERED, f"health.spike={spike}").health.spike == spike


def test_nothing_changes_after_validation() -> None:
    config = run()
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3
    with pytest.raises(ValueError, match="frozen"):
        config.run = config.run


# ---------------------------------------------------------------- what is refused

WRONG: dict[str, tuple[list[str], list[str]]] = {
    "misspelt key": (["model.layrs=3"], ["model.layrs", "did you mean model.layers?"]),
    "misspelt section": (["trian.steps=3"], ["trian", "did you mean train?"]),
    "misspelt nested key": (
        ["optim.schedule.warmup_step=3"],
        ["optim.schedule.warmup_step", "optim.schedule.warmup_steps?"],
    ),
    "misspelt group key": (
        ["optim.groups.embedding.patern=x"],
        ["optim.groups.embedding.patern", "pattern?"],
    ),
    "key of another choice": (
        ["optim=adamw", "optim.momentum=0.5"],
        ["optim.momentum", "other choices"],
    ),
    "unknown model": (
        ["model=dnt_12m"],
        ["model=dnt_12m", "did you mean dnt_124m?", "gpt_774m", "dnt_nano"],
    ),
    "unknown optimizer": (["optim=sgd"], ["optim=sgd", "adamw, ", "msgdw, ", "msgdw_r, "]),
    "unknown engine": (
        ["engine=zero9"],
        ["engine=zero9: no such choice", "ddp, fsdp, hsdp, zero0, zero1, zero2, zero3, zero3_off"],
    ),
    "a list of models": (["model=[1]"], ["model=[1]: no such choice", "dnt_nano"]),
    "a list of optimizers": (["optim=[1,2]"], ["optim=[1,2]: no such choice", "adamw, "]),
    "a value for a section": (["train=5"], ["train: is a section", "as train.KEY=VALUE", "5"]),
    "a value for a group": (
        ["optim.groups.a=x"],
        ["optim.groups.a: is a section", "as optim.groups.a.KEY=VALUE"],
    ),
    "a list for a section": (["eval=[1]"], ["eval=[1]: eval is a section", "as eval.KEY=VALUE"]),
    "unknown preset": (["preset=dem"], ["did you mean demo?"]),
    "unknown setting": (
        ["model.setting=S6"],
        ["model.setting", "'S1', 'S2', 'S3', 'S4', 'S5' or 'peri'", "'S6'"],
    ),
    "unknown norm": (["model.norm=batch"], ["model.norm", "'rmsnorm' or 'layernorm'"]),
    "unknown algorithm": (
        ["optim.algorithm=msgwd"],
        [
            "optim.algorithm: no such algorithm; did you mean msgdw?",
            "There are: adamw, ",
            "'msgwd'",
        ],
    ),
    "no algorithm": (["~optim.algorithm"], ["optim.algorithm: Field required"]),
    "an optimizer that is none": (
        ["optim.algorithm=[1]"],
        ["optim.algorithm: no such algorithm. There are: adamw, "],
    ),
    "not a number": (["optim.lr=fast"], ["optim.lr", "number", "'fast'"]),
    "not a whole number": (["train.steps=1.5"], ["train.steps", "integer", "1.5"]),
    "not a truth value": (["model.bias=perhaps"], ["model.bias", "boolean", "'perhaps'"]),
    "negative": (["optim.lr=-1"], ["optim.lr", "greater than or equal to 0", "-1"]),
    "zero": (["model.layers=0"], ["model.layers", "greater than 0"]),
    "not a number at all": (["optim.lr=nan"], ["optim.lr", "finite", "nan"]),
    "infinite": (["model.gain_init=inf"], ["model.gain_init", "finite", "inf"]),
    "an unset variable": (
        ["run.name=${oc.env:DNT_SCALE_NOWHERE}"],
        ["run.name", "'DNT_SCALE_NOWHERE' not found"],
    ),
    "a reference to nothing": (["run.dir=runs/${run.nme}"], ["run.dir", "'run.nme' not found"]),
    "a circle": (["run.dir=${run.dir}/x"], ["run.dir", "Recursive"]),
    "a section removed": (["~optim"], ["optim: Field required"]),
    "no name": (["run.name="], ["run.name", "''"]),
    "a folder as the name": (["run.name=a/b"], ["run.name", "'a/b'"]),
    "a hidden name": (["run.name=.."], ["run.name", "'..'"]),
    "heads and width": (["model.heads=5"], ["model", "width 768", "heads 5", "change one"]),
    "steps and tokens": (
        ["train.tokens=1000", "train.steps=10000"],
        ["train", "one of steps and tokens", "steps=10000", "tokens=1000"],
    ),
    "neither steps nor tokens": (
        ["train.steps=null"],
        ["train", "one of steps and tokens", "None"],
    ),
    "rows for adamw": (
        ["optim=adamw", "optim.groups={e: {pattern: emb, update: row_normalized}}"],
        ["groups.e.update", "row_normalized", "only msgdw"],
    ),
    "a global clip without a gradient": (
        ["optim.nesterov=false", "optim.gradient_buffer=false"],
        ["optim: clip is global", "gradient_buffer False", "set optim.clip=tensor or previous"],
    ),
    "a clip that needs no gradient": (
        ["optim.clip=tensor"],
        ["optim: clip is tensor", "gradient_buffer True"],
    ),
    "adamw without a gradient": (
        ["optim=adamw", *UNBUFFERED],
        ["optim: adamw needs the gradient after backward; set gradient_buffer: true"],
    ),
    "an update that nothing has": (
        ["optim.groups={e: {pattern: emb, update: rows}}"],
        ["optim.groups.e.update: no such update. There are: capped, orthogonalized, plain, "],
    ),
    "nesterov without a gradient": (
        UNBUFFERED,
        ["optim: nesterov needs the gradient"],
    ),
    "a spike clipped without a gradient": (
        ["optim=msgdw", *UNBUFFERED, "health.spike=clip"],
        ["health.spike is clip", "the momentum has taken the gradient", "use rollback"],
    ),
    "a spike skipped without a gradient": (
        ["optim=msgdw", *UNBUFFERED, "health.spike=skip"],
        ["health.spike is skip", "the momentum has taken the gradient", "use rollback"],
    ),
    "zero without a gradient buffer": (
        ["engine=zero2", "optim=msgdw", *UNBUFFERED],
        ["optim.gradient_buffer is false, but engine=zero2", "use engine=fsdp"],
    ),
    "a key that DeepSpeed does not have": (
        ["engine=zero2", "engine.deepspeed={zero_optimization: {reduce_bucket_sise: 5}}"],
        [
            "engine.deepspeed.zero_optimization.reduce_bucket_sise: no such key",
            "did you mean reduce_bucket_size?",
        ],
    ),
    "checkpoints nowhere": (["checkpoint.dir=''"], ["checkpoint.dir", "at least 1 character"]),
    "a weight in a set named as an engine": (
        ["data.path=null", "data.mixture.fsdp={path: x, weight: -1}"],
        ["data.mixture.fsdp.weight: "],
    ),
    "a group named as an engine": (
        ["optim.groups.ddp={pattern: 3, lr: -1}"],
        ["optim.groups.ddp.lr: "],
    ),
    "copies of fsdp": (
        ["engine=fsdp", "engine.replicas=2"],
        ["engine: replicas is 2", "engine=hsdp"],
    ),
    "a key of the other engine": (
        ["engine=zero2", "engine.prefetch=2"],
        ["engine.prefetch", "other choices"],
    ),
    "an optimizer that is whole offloaded": (
        ["engine=zero0", "engine.offload_optimizer=true"],
        ["engine: offload_optimizer needs a sharded optimizer"],
    ),
    "weights that are whole offloaded": (
        ["engine=zero2", "engine.offload_parameters=true"],
        ["engine: offload_parameters needs sharded weights", "zero3"],
    ),
    "zero3 compiled": (
        ["engine=zero3", "engine.compile=true"],
        ["engine: compile does not go with zero3"],
    ),
    "every block twice": (
        ["engine.activation_checkpointing=1"],
        ["engine.activation_checkpointing"],
    ),
    "an unknown spike": (["health.spike=ignore"], ["health.spike", "'skip', 'clip' or 'rollback'"]),
    "a path and a mixture": (
        MIXTURE[1:],
        ["data: set one of path and mixture", "shards", "wiki, code in mixture"],
    ),
    "neither path nor mixture": (
        ["data.path=null"],
        ["data: set one of path and mixture", "path=None and no sets"],
    ),
    "no weight": (
        ["data.path=null", "data.mixture.a.path=x"],
        ["data.mixture.a.weight: Field required"],
    ),
    "a weight of nothing": (
        [*MIXTURE, "data.mixture.code.weight=0"],
        ["mixture.code.weight", "greater than 0"],
    ),
    "an endless weight": (
        [*MIXTURE, "data.mixture.code.weight=inf"],
        ["mixture.code.weight", "finite"],
    ),
    "too large a weight": (
        [*MIXTURE, "data.mixture.code.weight=1e13"],
        ["mixture.code.weight", "1000000000000"],
    ),
    "a set named as a metric": (
        [*MIXTURE, "data.mixture.loss={path: x, weight: 1}"],
        ["data.mixture.loss", "metric val/loss", "another name"],
    ),
    "a long name of a set": (
        [*MIXTURE, f"data.mixture.{'a' * 101}={{path: x, weight: 1}}"],
        ["aaa", "100 characters"],
    ),
    "a set with a slash": (
        ["data.mixture={a/b: {path: x, weight: 1}}"],
        ["data.mixture.a/b", "pattern"],
    ),
    "a misspelt weight": (
        [*MIXTURE, "data.mixture.code.wieght=1"],
        ["data.mixture.code.wieght: no such field"],
    ),
    "a mixture without its group": (
        ["data.path=???", "data.mixture.wiki.path=a", "data.mixture.wiki.weight=1"],
        ["data.path: is not set", "add data=mixture"],
    ),
    "a mixture without a name": (
        ["run.name=???", *MIXTURE, "data.mixture.wiki.weight=2"],
        ["run.name: is not set; add run.name=VALUE"],
    ),
    "a group without a name": (
        ["run.name=???", "optim.groups.gains={pattern: gain}", "optim.groups.gains.lr=0.1"],
        ["run.name: is not set; add run.name=VALUE"],
    ),
    "a misspelt weight without a name": (
        ["run.name=???", *MIXTURE, "data.mixture.code.wieght=1"],
        ["data.mixture.code.wieght: no such key", "data.mixture.*.weight?"],
    ),
    "two mistakes": (["model.layrs=3", "optim.lr=fast"], ["model.layrs", "optim.lr"]),
    "no value": (["train.steps"], ["train.steps", "key=value"]),
    "no key": (["=3"], ["=3", "no such key"]),
    "nothing": ([""], ["key=value"]),
    "half an interpolation": (["run.name=${"], ["run.name: ", "'${'"]),
    "a sweep of values": (["optim.lr=1,2"], ["optim.lr=1,2", "several values are a sweep"]),
    "a sweep of choices": (
        ["model=dnt_nano,gpt_nano"],
        ["model=dnt_nano,gpt_nano", "several values are a sweep"],
    ),
    "a range": (["optim.lr=range(1,3)"], ["optim.lr=range(1,3)", "several values are a sweep"]),
    "a glob": (["model=glob(*)"], ["model=glob(*)", "several values are a sweep"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_that_names_the_field(case: str) -> None:
    overrides, expected = WRONG[case]
    message = refused(*overrides)
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("given_one", "missing"), [("data.path=x", "run.name"), ("run.name=x", "data.path")]
)
def test_mandatory_keys_are_asked_for(given_one: str, missing: str) -> None:
    assert refused(given_one, minimal=False).startswith(
        f"{missing}: is not set; add {missing}=VALUE"
    )


RAW = yaml.safe_load(to_yaml(load(["preset=demo"])))
ADAMW_RAW = yaml.safe_load(to_yaml(load(["preset=demo", "optim=adamw"])))
LEAVES = sorted(
    key
    for key in flat(validate(RAW)).keys() | flat(validate(ADAMW_RAW)).keys()
    if ".groups." not in key
)


def misspellings(key: str) -> list[str]:
    """Every way to drop one character that does not give another real key."""
    dropped = {key[:i] + key[i + 1 :] for i in range(len(key))}
    return sorted(dropped - set(LEAVES))


def names_the_misspelling(message: str, misspelt: str) -> bool:
    parts = misspelt.split(".")
    return any(f"{'.'.join(parts[: i + 1])}: no such field" in message for i in range(len(parts)))


def test_every_misspelling_of_every_key_in_a_config_file_is_named() -> None:
    tried = 0
    for raw, keys in (
        (RAW, LEAVES),
        (ADAMW_RAW, [key for key in LEAVES if key.startswith("optim.")]),
    ):
        for key in keys:
            for misspelt in misspellings(key):
                tree: dict[str, Any] = deepcopy(raw)
                *sections, leaf = misspelt.split(".")
                node = tree
                for section in sections:
                    node = node.setdefault(section, {})
                node[leaf] = 1
                with pytest.raises(ConfigError) as caught:
                    validate(tree)
                assert names_the_misspelling(str(caught.value), misspelt), misspelt
                tried += 1
    assert tried > 700


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_a_misspelt_override_is_named(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(LEAVES))
    misspelt = data.draw(st.sampled_from(misspellings(key)))
    assume(not misspelt.startswith(".") and not misspelt.endswith("."))
    message = refused(f"{misspelt}=1")
    assert names_the_misspelling(message, misspelt), (misspelt, message)


def test_a_misspelt_key_is_named_with_the_right_one() -> None:
    """Most of the time: the nearest name is not always the one that was meant."""
    right = 0
    wanted = [key for key in LEAVES if len(key.split(".")[-1]) > 4]
    for key in wanted:
        section, _, leaf = key.rpartition(".")
        tree: dict[str, Any] = deepcopy(ADAMW_RAW if key in flat(validate(ADAMW_RAW)) else RAW)
        node = tree
        for part in section.split("."):
            node = node[part]
        node[leaf[:2] + leaf[3:]] = 1  # without its third letter
        with pytest.raises(ConfigError) as caught:
            validate(tree)
        right += f"did you mean {key}?" in str(caught.value)
    assert right == len(wanted)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.text(max_size=30),
        st.builds(
            "{}={}".format,
            st.sampled_from([*LEAVES, *GROUPS, "hydra", "+x", "~model"]),
            st.text(max_size=20),
        ),
    )
)
def test_any_override_at_all_is_accepted_or_refused_in_our_words(text: str) -> None:
    try:
        run(text)
    except ConfigError as error:
        assert str(error)


def test_a_choice_longer_than_a_file_name_may_be_is_refused() -> None:
    assert "There are: adamw" in refused("optim=" + "a" * 300)


# ---------------------------------------------------------------- nothing runs


def test_overrides_are_data_and_run_nothing(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    for override in (
        f"+run._target_=pathlib.Path.touch,+run._args_=[{witness}]",
        f"+x={{_target_: pathlib.Path.touch, self: {witness}}}",
        f"model={{_target_: pathlib.Path.touch, self: {witness}}}",
        "run.name=${eval:1}",
        "run.name=${python:1}",
        "run.name=${oc.create:{a: 1}}",
        "run.dir=${oc.decode:'!!python/object/apply:os.getcwd []'}x${run.dir}",
    ):
        refused(override)
    assert "no such field" in refused("+model._target_=os.system")
    assert "x: no such field" in refused("+x=${oc.env:HOME}")
    assert not witness.exists()


def test_a_config_file_is_data_and_runs_nothing(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    path = tmp_path / "config.yaml"
    path.write_text(f"run: !!python/object/apply:os.mkdir ['{witness}']\n")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        from_yaml(path)
    assert not witness.exists()


# ---------------------------------------------------------------- to disk and back


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optim=adamw", "model=gpt_1.4b"],
        ["data.path=null", *MIXTURE[1:], "data.document_mask=true"],
        [
            "train.steps=null",
            "train.tokens=1e9",
            "optim.clip_norm=null",
            "tracking.uri=http://localhost:5000",
        ],
        [
            "optim.groups.x={pattern: 'w_[qk]\\.', lr: 0.3, weight_decay: 0}",
            "run.dir=/elsewhere",
            "model.bias=true",
        ],
        ["optim.lr=0.1234567890123456789", "model.norm_eps=1e-12", "run.seed=123456789012345678"],
    ],
)
def test_yaml_round_trip(overrides: list[str], tmp_path: Path) -> None:
    config = run(*overrides)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    again = from_yaml(path)
    assert again == config and to_yaml(again) == to_yaml(config)
    assert list(yaml.safe_load(to_yaml(config))) == list(RunConfig.model_fields)


def test_a_config_file_that_is_not_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match=r"config\.yaml: no such file"):
        from_yaml(path)
    for content, complaint in (
        (b"a: [1", "not readable as YAML"),
        (b"\xff\xfe\x00", "not readable as YAML"),
        (b"", "should be a valid dictionary"),
        (b"- 1\n- 2\n", "should be a valid dictionary"),
        (
            to_yaml(run()).replace("layers", "layres").encode(),
            "model.layres: no such field; did you mean model.layers",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            from_yaml(path)
        assert str(path) in str(caught.value) and complaint in str(caught.value)


def test_flat_is_every_leaf_as_a_scalar() -> None:
    for config in (run(), run("optim=adamw"), load(["preset=demo", "model.bias=true"])):
        got = flat(config)
        assert all(value is None or isinstance(value, str | int | float) for value in got.values())
        tree = config.model_dump(mode="json")
        for key, value in got.items():
            node: Any = tree
            for part in key.split("."):
                node = node[part]
            assert value == (str(node) if isinstance(node, list) else node)
    got = flat(run("optim=adamw"))
    assert (got["optim.betas"], got["run.dir"], got["train.tokens"]) == (
        "[0.9, 0.95]",
        "runs/try",
        None,
    )
    assert got["data.path"] == str(Path("shards").absolute()) and "model" not in got
    assert flat(run())["optim.groups.gains.update"] == "tensor_normalized"


# ---------------------------------------------------------------- the budget


def budget(steps: int | None, tokens: int | None, batch: int) -> RunConfig:
    train = RAW["train"] | {"steps": steps, "tokens": tokens, "global_batch": batch}
    return validate(RAW | {"train": train})


def test_total_steps_by_hand() -> None:
    assert budget(37, None, 4).total_steps(256) == 37
    assert [budget(None, n, 2).total_steps(5) for n in (1, 9, 10, 11, 1000, 1001)] == [
        1,
        1,
        1,
        2,
        100,
        101,
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 10**15), batch=st.integers(1, 10**5), seq_len=st.integers(1, 10**5))
def test_total_steps_is_the_fewest_that_reach_the_tokens(
    tokens: int, batch: int, seq_len: int
) -> None:
    steps = budget(None, tokens, batch).total_steps(seq_len)
    below, reached = ((steps - i) * batch * seq_len for i in (1, 0))
    assert below < tokens <= reached
    assert all(
        a <= b
        for a, b in pairwise(
            budget(None, t, batch).total_steps(seq_len) for t in (tokens, tokens + 1)
        )
    )


def test_a_misspelt_mandatory_key_is_named_before_it_is_missed() -> None:
    with pytest.raises(ConfigError, match=r"run\.nme: no such key; did you mean run\.name\?"):
        load(["run.nme=x", "data.path=d"])


@pytest.mark.parametrize("url", ["sftp://me:s3cret@host/runs", "https://host/runs?token=s3cret"])
def test_a_place_for_checkpoints_holds_no_password(url):
    with pytest.raises(ConfigError, match="checkpoint: dir holds a login") as refused:
        load(["run.name=a", "data.path=set", f"checkpoint.dir='{url}'"])
    assert "s3cret" not in str(refused.value)
    assert load(
        ["run.name=a", "data.path=set", "checkpoint.dir='sftp://me@host/runs'"]
    ).checkpoint.dir
