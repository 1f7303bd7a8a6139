"""Registry of sections: found by the name of a file, which nothing lists."""

import sys

import pytest

from dnt_scale.config.kinds import Registry

VIT = """\
from typing import Literal
from dnt_scale.config.base import Strict
from rooms_of_a_test import KINDS


@KINDS.register
class Vit(Strict):
    kind: Literal["vit"] = "vit"
    patch: int
"""


@pytest.fixture
def kinds(tmp_path, monkeypatch):
    package = tmp_path / "rooms_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "other.py").write_text("imported = True\n")
    (package / "vit.py").write_text(VIT)
    monkeypatch.syspath_prepend(str(tmp_path))
    import rooms_of_a_test

    rooms_of_a_test.KINDS = Registry("model", "rooms_of_a_test", default="vit")
    yield rooms_of_a_test.KINDS
    for name in [name for name in sys.modules if name.startswith("rooms_of_a_test")]:
        del sys.modules[name]


def test_a_kind_is_a_file_named_after_it(kinds):
    assert kinds.loaded() == []
    assert (
        kinds.validate({"patch": 4}, None).patch
        == kinds.validate({"kind": "vit", "patch": 4}, None).patch
        == 4
    )
    assert [cls.__name__ for cls in kinds.loaded()] == ["Vit"]
    assert "rooms_of_a_test.other" not in sys.modules


def test_fields_of_kinds_that_nobody_has_asked_for_yet_are_found(kinds):
    assert [cls.__name__ for cls in kinds.having("patch")] == ["Vit"]
    assert kinds.having("pacth") == []


@pytest.mark.parametrize("kind", ["vitt", "other", "../vit", 7, None])
def test_an_unknown_kind_is_named_with_those_there_are(kinds, kind):
    with pytest.raises(ValueError, match=r"no such kind.* There are: vit"):
        kinds.validate({"kind": kind, "patch": 4}, None)


def test_two_classes_of_one_kind_are_refused(kinds):
    vit = kinds.find("vit")
    assert kinds.register(vit) is vit

    class Again(vit):
        pass

    with pytest.raises(
        ValueError, match=r"model\.kind vit: .*Again and rooms_of_a_test\.vit\.Vit both have it"
    ):
        kinds.register(Again)
