"""Where compiled blocks are kept, and the line that tells how long compiling took."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dnt_scale.engine import compiled
from dnt_scale.train.hooks.compilation import Compilation


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(compiled.CACHE, "")  # so that it is as before when the test is over
    monkeypatch.delenv(compiled.CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_users_cache(tmp_path: Path) -> None:
    compiled.prepare()
    assert os.environ[compiled.CACHE] == str(tmp_path / "dnt-scale" / "compiled")
    assert Path(os.environ[compiled.CACHE]).is_dir()
    assert torch._dynamo.config.recompile_limit >= compiled.SHAPES


def test_a_place_that_was_chosen_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(compiled.CACHE, "/chosen")
    compiled.prepare()
    assert os.environ[compiled.CACHE] == "/chosen" and not list(tmp_path.iterdir())


def test_where_there_is_no_room_it_is_torchs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiled.prepare()
    assert compiled.CACHE not in os.environ


@pytest.mark.parametrize("compiles", [False, True])
def test_it_is_told_once(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    run: Any = SimpleNamespace(
        config=SimpleNamespace(engine=SimpleNamespace(compile=compiles)),
        progress=SimpleNamespace(say=said.append),
    )
    monkeypatch.setattr(compiled, "seconds", lambda: 34.4)
    monkeypatch.setenv(compiled.CACHE, "/kept")
    hook = Compilation()
    for _ in range(3):
        hook.after_step(run, cast(Any, None))
    line = "engine.compile: 34 s until the first step was done; kept for the next start in /kept"
    assert said == ([line] if compiles else [])


def test_seconds_of_this_process() -> None:
    before = compiled.seconds()
    torch.compile(lambda x: x.cos() + 1, backend="eager")(torch.ones(3))
    assert compiled.seconds() > before >= 0
