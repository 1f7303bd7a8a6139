"""Every option of every command has bounds: a value out of them is one line and exit status 2,
never a traceback.
"""

import argparse
import contextlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dnt_scale import arguments
from dnt_scale.cli.main import main, parser


def dnt(*words: str) -> tuple[int, str]:
    """The exit status of a command in this process, and what it said on stderr."""
    err, out = io.StringIO(), io.TextIOWrapper(io.BytesIO())
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        try:
            status = main(list(words))
        except SystemExit as end:
            status = int(end.code or 0)
    return status, err.getvalue()


def refused(*words: str) -> str:
    """The one line of a command that ends with status 2."""
    status, err = dnt(*words)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in err and "usage:" not in err, (
        words,
        err,
    )
    return lines[0].removeprefix("error: ")


def commands(
    root: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], list]]:
    """The words of every command, and its options and positionals."""
    inner = [action for action in root._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield words, [action for action in root._actions if action.dest != "help"]
    for action in inner:
        for name, command in action.choices.items():
            yield from commands(command, (*words, name))


ALL = dict(commands(parser()))
OPTIONS = [
    (words, action.option_strings[-1], action)
    for words, actions in ALL.items()
    for action in actions
    if action.option_strings and action.nargs != 0
]
NEEDED = {"data prepare": ["in", "--out", "o"], "data tokenizer": ["in", "--out", "o"]}
HARMLESS = {
    "ui",
    "sandbox up",
    "sandbox down",
    "sandbox status",
    "sandbox kill-node",
    "sandbox start-node",
}  # parsed only


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, which is the home as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_walk_finds_all_commands() -> None:
    assert {"train", "data prepare", "checkpoint convert", "sandbox up", "submit"} <= {
        " ".join(words) for words in ALL
    }
    assert {"--temperature", "--val-fraction", "--port", "--ranks", "--cpus"} <= {
        option for _, option, _ in OPTIONS
    }
    assert not [
        words
        for words, actions in ALL.items()
        for action in actions
        if action.type in (int, float, Path)
    ]


@pytest.mark.parametrize(
    "value",
    ["nan", "-1e999", "-" + "9" * 30, "1e3x", "", "é", "\udcff", "0x10", "true", "½", "1,5", "٣x"],
)
def test_a_number_out_of_bounds_names_option_found_and_expected(value: str, nowhere: Path) -> None:
    found = 0
    for words, option, action in OPTIONS:
        # of arguments.whole and arguments.number
        if getattr(action.type, "__name__", "") == "read":
            own = NEEDED.get(
                " ".join(words), [*(["r"] if words[0] in ("generate", "eval", "logs") else [])]
            )
            line = refused(*words, *own, f"{option}={value}")
            assert line.startswith(f"{option}: found ") and ", expected a " in line, line
            found += 1
    assert found > 15


@pytest.mark.parametrize(
    ("option", "least", "most"),
    [
        ("--temperature", 0, None),
        ("--tokens", 0, None),
        ("--top-k", 0, None),
        ("--seed", 0, 2**64 - 1),
    ],
)
def test_the_ends_of_the_bounds(option: str, least: int, most: int | None, nowhere: Path) -> None:
    assert "config.yaml: no such file" in refused("generate", "r", option, str(least))
    assert f"{option}: found" in refused("generate", "r", f"{option}={least - 1}")
    if most:
        assert "config.yaml: no such file" in refused("generate", "r", option, str(most))
        assert f"{option}: found" in refused("generate", "r", option, str(most + 1))


def test_numbers_by_hand() -> None:
    assert arguments.number(0, 1, below=True)("0.999") == 0.999 and arguments.whole(1, 5)("5") == 5
    assert arguments.number(0, 1, above=True)("1") == 1 == arguments.number(0, above=True)("1")
    for read, text in (
        (arguments.number(0, 1, below=True), "1"),
        (arguments.number(0, 1, above=True), "0"),
        (arguments.number(0), "inf"),
        (arguments.whole(0), "1.0"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=f"found {text}, expected"):
            read(text)
    assert math.isclose(arguments.number(0)("1e-320"), 1e-320)


def test_a_prompt_of_other_bytes_has_replacement_characters() -> None:
    assert arguments.prompt(os.fsdecode(b"\xff\xfe")) == "\ufffd\ufffd"
    assert arguments.prompt(os.fsdecode("größe".encode() + b"\xc3")) == "größe\ufffd"
    assert "\ud800" not in arguments.prompt("a\ud800b") and arguments.prompt("a\ud800b")[0] == "a"


@pytest.mark.parametrize("path", ["", "\0", "a\0b"])
def test_a_path_that_cannot_be_one(path: str, nowhere: Path) -> None:
    for words in (
        ["generate"],
        ["data", "info"],
        ["checkpoint", "inspect"],
        ["jobs"],
        ["cancel"],
        ["logs"],
        ["resubmit"],
    ):
        assert "expected a path" in (line := refused(*words, path)) or "NUL" in line
    for option in ("--out", "--append", "--tokenizer", "--clean"):
        assert refused("data", "prepare", "in", "--out", "o", option, path).startswith(
            f"{option}: "
        )
    assert refused("generate", "r", "--data", path).startswith("--data: ")


def test_a_file_for_a_folder_and_a_folder_for_a_file(nowhere: Path) -> None:
    (nowhere / "file").write_text("x")
    (nowhere / "folder.safetensors").mkdir()
    (nowhere / "in.txt").write_text("some text\n")
    for words, says in (
        (["generate", "file"], "file/config.yaml: no such file; give the folder of a run"),
        (["eval", "file"], "file/config.yaml: no such file"),
        (["data", "info", "file"], "file: no such folder"),
        (["data", "verify", "file"], "file: no such folder"),
        (["checkpoint", "inspect", "file"], "file: no checkpoint there"),
        (["checkpoint", "convert", "r", "folder.safetensors"], "folder.safetensors: is a folder"),
        (
            ["checkpoint", "convert", "r", "no/such/x.safetensors"],
            "there is no folder no/such to write it to",
        ),
        (
            ["checkpoint", "convert", "r", "file/x.safetensors"],
            "there is no folder file to write it to",
        ),
        (["data", "prepare", "in.txt", "--out", "file"], "file: is a file"),
        (["data", "prepare", "in.txt", "--out", "o", "--append", "file"], "file: no such folder"),
        (
            ["data", "prepare", "in.txt", "--out", "o", "--tokenizer", "folder.safetensors"],
            "Is a directory",
        ),
        (
            ["data", "prepare", "in.txt", "--out", "o", "--clean", "folder.safetensors"],
            "Is a directory",
        ),
        (["train", "run.name=x", "data.path=file", "run.device=cpu"], "file: no such folder"),
        (["submit", "cluster=./folder.safetensors"], "Is a directory"),
        (["submit", "cluster=./file", "run.name=x"], "file: found 'x', expected lines such as"),
    ):
        assert says in refused(*words), words


def test_a_home_in_an_option_is_expanded(nowhere: Path) -> None:
    for words in (
        ["generate", "~/r"],
        ["data", "info", "~/r"],
        ["checkpoint", "inspect", "~/r"],
        ["jobs", "~/r"],
    ):
        assert f"{nowhere}/r" in refused(*words)
    for option in ("--append", "--tokenizer"):
        assert f"{nowhere}/r" in refused("data", "prepare", "in", "--out", "o", option, "~/r")
    assert f"{nowhere}/r" in refused("data", "prepare", "~/r", "--out", "o")


ODD = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        [
            "",
            "null",
            "true",
            "-1",
            "nan",
            "inf",
            "1e999",
            str(2**70),
            "a" * 300,
            "\0",
            "\udcff",
            "~",
            "zzz://x",
        ]
    ),
    st.sampled_from(
        [
            "=",
            "x=1",
            "run.name=",
            "data=./no.yaml",
            "model=(",
            "optim.lr=1,2",
            "cluster=no",
            "[",
            "{a: b}",
            "é=é",
        ]
    ),
).filter(lambda text: not text.startswith(("/", "-")) or text == "-1")


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A command of the real parser, with values for what it needs and for some of its options."""
    words = draw(st.sampled_from(sorted(ALL)))
    line: list[str] = []
    options: list[str] = []
    for action in ALL[words]:
        few = {"*": (0, 3), "+": (1, 3), None: (1, 1)}
        if not action.option_strings:
            least, most = few[action.nargs]
            line += draw(st.lists(ODD, min_size=least, max_size=most))
        elif (action.required or draw(st.booleans())) and action.dest != "watch":
            value = draw(st.sampled_from(sorted(action.choices)) | ODD if action.choices else ODD)
            options += (
                [action.option_strings[-1]]
                if action.nargs == 0
                else [f"{action.option_strings[-1]}={value}"]
            )
    return " ".join(words), [*words, *line, *options]


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(command_lines())
def test_no_command_line_ends_in_a_traceback(nowhere: Path, case: tuple[str, list[str]]) -> None:
    words, line = case
    if words in HARMLESS:
        with contextlib.redirect_stderr(err := io.StringIO()), contextlib.suppress(SystemExit):
            parser().parse_args(line)
        assert err.getvalue().count("error: ") == err.getvalue().count("\n")
        return
    status, err_text = dnt(*line)
    assert status in (0, 2) and "Traceback" not in err_text
    assert status == 0 or "error: " in err_text
