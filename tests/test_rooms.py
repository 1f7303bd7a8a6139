"""The house rules of docs/design.md that imports can break: one way only, and heavy things late."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("cluster", "dnt_scale", "data_prep")
# imports the file of a kind by the name that a configuration has
BY_NAME = ROOT / "dnt_scale" / "config" / "kinds.py"
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
LATE = {
    "mlflow",
    "tensorboard",
    "optuna",
    "deepspeed",
    "torchao",
    "submitit",
    "transformers",
    "lm_eval",
    "matplotlib",
}
# A room imports only from rooms on lower floors; those of one floor do not know each other.
FLOORS = {
    "dnt_scale": [
        {"startup"},
        {"config"},
        {"distributed"},
        {"checkpoint", "model", "optim"},
        {"record", "data", "engine", "costs"},
        {"train"},
        {"tools", "sweep"},
        {"report"},
        {"arguments"},
        {"cli"},
    ],
    "cluster": [
        {"slurm", "sandbox"},
        {"cluster_config"},
        {"run_record"},
        {"sweep_jobs"},
        {"job", "watch"},
        {"submit"},
        {"commands"},
    ],
}
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
# copied into exported folders, imported by nobody here
REMOTE_CODE = "dnt_scale/tools/hugging_face/remote_code/"
# a subclass of the harness's model, imported where it is used
HARNESS_MODEL = "dnt_scale/tools/harness/language_model.py"


def imports(
    path: Path, source: str | None = None, *, at_import_only: bool = False
) -> Iterator[str]:
    """Dotted names that a file imports, ``from a import b`` as ``a.b``; optionally only what
    importing it runs.
    """

    def walk(node: ast.AST) -> Iterator[str]:
        if at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if (
            at_import_only
            and isinstance(node, ast.If)
            and ast.unparse(node.test).endswith("TYPE_CHECKING")
        ):
            for child in node.orelse:
                yield from walk(child)
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = path.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
            base = ".".join([*here, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            if path == BY_NAME:
                return
            module = node.args[0]
            if isinstance(module, ast.JoinedStr):  # f"package.{name}": some module of that package
                module = module.values[0]
                assert isinstance(module, ast.Constant) and str(module.value).endswith("."), (
                    f"{path}:{node.lineno}"
                )
            assert isinstance(module, ast.Constant), (
                f"{path}:{node.lineno}: an import that no one can check"
            )
            yield str(module.value).rstrip(".")
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return walk(ast.parse(path.read_text() if source is None else source, str(path)))


def top(name: str) -> str:
    return name.partition(".")[0]


def test_there_is_something_to_check() -> None:
    assert {
        "dnt_scale/train/loop.py",
        "dnt_scale/engine/deepspeed.py",
        "data_prep/shards.py",
    } <= set(NAMES)
    found = set(imports(ROOT / "dnt_scale" / "train" / "rank.py"))
    assert "dnt_scale.config.RunConfig" in found and "signal" in found


def test_the_reader_of_imports_reads_them_all() -> None:
    path = ROOT / "dnt_scale" / "engine" / "made_up.py"
    source = """
import a.b, c as d
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import only_types
else:
    import otherwise
try:
    from e import f
except ImportError:
    pass
class Here:
    import g
def later():
    import h
    importlib.import_module("i.j")
    importlib.import_module(f"k.l.{name}")
from . import base
from ..model import DNT
"""
    always = {"a.b", "c", "typing.TYPE_CHECKING", "otherwise", "e.f", "g"}
    always |= {"dnt_scale.engine.base", "dnt_scale.model.DNT"}
    assert set(imports(path, source, at_import_only=True)) == always
    assert set(imports(path, source)) == always | {"only_types", "h", "i.j", "k.l"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("data_prep/")])
def test_data_prep_knows_no_other_room_and_no_torch(name: str) -> None:
    assert not {top(found) for found in imports(ROOT / name)} & {"dnt_scale", "cluster", "torch"}


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n.startswith("dnt_scale/") and not n.startswith("dnt_scale/cli/")]
)
def test_dnt_scale_takes_only_the_format_from_data_prep_and_nothing_from_cluster(name: str) -> None:
    found = list(imports(ROOT / name))
    assert not [module for module in found if top(module) == "cluster"]
    from_data_prep = [module for module in found if top(module) == "data_prep"]
    formats = ("data_prep.shards", "data_prep.tokenizer", "data_prep.images.shards")
    assert all(
        f"{module}.".startswith(tuple(f"{each}." for each in formats)) for module in from_data_prep
    ), from_data_prep


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("cluster/")])
def test_cluster_has_no_model_code(name: str) -> None:
    found = {".".join(module.split(".")[:2]) for module in imports(ROOT / name)}
    assert not found & {"dnt_scale.model", "dnt_scale.optim", "dnt_scale.engine"}


@pytest.mark.parametrize(
    "name", [n for n in NAMES if not n.startswith(("cluster/", REMOTE_CODE, HARNESS_MODEL))]
)
def test_heavy_packages_are_imported_where_they_are_used(name: str) -> None:
    assert not {top(found) for found in imports(ROOT / name, at_import_only=True)} & LATE


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(REMOTE_CODE)])
def test_exported_code_runs_where_dnt_scale_is_not_installed(name: str) -> None:
    beside = REMOTE_CODE.replace("/", ".")
    found = {top(each) for each in imports(ROOT / name) if not each.startswith(beside)}
    assert found <= {"torch", "transformers", "sentencepiece"} | set(sys.stdlib_module_names)


def test_the_harness_is_imported_where_it_is_used() -> None:
    module = HARNESS_MODEL.removesuffix(".py").replace("/", ".")
    users = [n for n in NAMES if any(f"{i}.".startswith(f"{module}.") for i in imports(ROOT / n))]
    assert users
    for name in users:
        found = imports(ROOT / name, at_import_only=True)
        assert not any(each.startswith(module) for each in found)


TRACKERS = {  # what a tracker imports, and who may: its own file or folder, and `dnt ui`
    ("mlflow", "dnt_scale.record.mlflow"): ("dnt_scale/record/mlflow/", "dnt_scale/cli/run.py"),
    ("tensorboard", "torch.utils.tensorboard", "dnt_scale.record.tensorboard"): (
        "dnt_scale/record/tensorboard.py",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_is_known_in_its_own_room_only(name: str) -> None:
    for modules, rooms in TRACKERS.items():
        found = [
            module
            for module in imports(ROOT / name)
            if f"{module}.".startswith(tuple(f"{m}." for m in modules))
        ]
        assert not found or name.startswith(rooms)


def test_the_command_line_is_thin_until_a_command_is_chosen() -> None:
    found = {
        top(name) for name in imports(ROOT / "dnt_scale" / "cli" / "main.py", at_import_only=True)
    }
    assert not found & {"torch", "data_prep", "cluster", *LATE}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import dnt_scale, data_prep.pipeline, data_prep.shards", {"torch", *LATE}),
        ("import dnt_scale.cli.main", {"torch", *LATE}),
        ("import dnt_scale.config", {"torch", *LATE}),
        ("import dnt_scale.config as c; c.load(['preset=demo'])", {"torch", *LATE}),
        ("import dnt_scale.train.rank", LATE),
        ("import dnt_scale.data.decoders", {"hydra", "omegaconf", *LATE}),
    ],
)
def test_importing_leaves_these_out(statement: str, absent: set[str]) -> None:
    code = (
        f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in "
        f"sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "dnt_scale" in loaded
    assert not loaded & absent


@pytest.mark.parametrize("name", NAMES)
def test_a_file_fits_its_bound(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= 500


def arrows(package: str) -> set[tuple[str, str]]:
    """From which room to which other the files of a package import; a file outside of rooms is
    one.
    """
    found = set()
    for path in FILES:
        inside = path.relative_to(ROOT).with_suffix("").parts
        if inside[0] == package and inside[1] != "__init__":
            names = (name.split(".") for name in imports(path))
            found |= {
                (inside[1], name[1]) for name in names if name[0] == package and len(name) > 1
            }
    return {(start, end) for start, end in found if start != end}


@pytest.mark.parametrize("package", FLOORS)
def test_a_room_imports_only_from_the_floors_below(package: str) -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS[package]) for room in rooms}
    found = arrows(package)
    assert {room for arrow in found for room in arrow} <= floor.keys(), "a new room needs a floor"
    assert len(found) >= 20
    assert not {(start, end) for start, end in found if floor[start] <= floor[end]}


MOST_LINES = 80  # of a function
MOST_LOOP_LINES = 60  # of one in the training loop, so that a step is read on one screen


def long_functions(path: Path, most: int, source: str | None = None) -> list[str]:
    """The functions of a file, those inside of others too, that have more than ``most`` lines."""
    tree = ast.parse(path.read_text() if source is None else source, str(path))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(line.lineno for line in node.decorator_list)])
            lines = (node.end_lineno or first) - first + 1
            if lines > most:
                found.append(f"{path}: {node.name} has {lines} lines; at most {most}, break it up")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_function_fits_its_bound(name: str) -> None:
    most = MOST_LOOP_LINES if name == "dnt_scale/train/loop.py" else MOST_LINES
    assert not long_functions(ROOT / name, most)


def test_the_count_of_lines_sees_decorators_and_functions_in_functions() -> None:
    source = (
        "class A:\n    @one\n    @two(\n        3)\n    def f():\n        async def g():\n         "
        "   pass\n"
    )
    found = long_functions(ROOT / "made_up.py", 1, source)
    assert [line.partition(": ")[2].partition(";")[0] for line in found] == [
        "f has 6 lines",
        "g has 2 lines",
    ]


def test_tests_and_benchmarks_leave_each_other_alone() -> None:
    """What both need is in testbed/, which imports neither."""
    forbidden = {
        "tests": {"benchmarks"},
        "benchmarks": {"tests"},
        "testbed": {"tests", "benchmarks"},
    }
    for folder, others in forbidden.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            found = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
            assert not others & set(found), path
