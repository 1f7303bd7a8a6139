"""Sections that come in kinds: the class that reads ``model.kind: dnt`` is found by name, and
nothing lists them.

A kind is a section's class, which a file registers when it is imported. The file is called after
the kind and lies in the room that builds it (``model.kind: vit`` is ``dnt_scale/model/vit.py``), or
it is any file that was imported before the configuration is read. No file is imported before its
kind is asked for, so that a configuration costs the imports of its own kinds only.
"""

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from dnt_scale.config.base import nearest

Section = TypeVar("Section", bound=BaseModel)


class Registry:
    """The kinds of one section, by the value of its field ``tag``.

    Args:
        section: the configuration's key, for messages.
        package: where the file of a kind is looked for, by the kind's name.
        tag: the field that names the kind.
        default: the kind of a section that names none; None: it has to name one.
    """

    def __init__(
        self, section: str, package: str, *, tag: str = "kind", default: str | None = None
    ) -> None:
        self.section = section
        self.package = package
        self.default = default
        self.tag = tag
        self._classes: dict[str, type[BaseModel]] = {}

    def register(self, cls: type[Section]) -> type[Section]:
        """Make a class the kind that its field ``tag`` permits, a Literal. A class decorator.

        Raises:
            ValueError: another class has that kind.
        """
        [kind] = get_args(cls.model_fields[self.tag].annotation)
        other = self._classes.get(kind, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"{self.section}.{self.tag} {kind}: {cls.__module__}.{cls.__qualname__} and "
                f"{other.__module__}.{other.__qualname__} both have it; give one another"
            )
        self._classes[kind] = cls
        return cls

    def find(self, kind: str) -> type[BaseModel] | None:
        """Return the class of a kind, from its file if that was not imported yet; None where there
        is none.
        """
        if (
            kind not in self._classes
            and kind.isidentifier()
            and find_spec(f"{self.package}.{kind}")
        ):
            import_module(f"{self.package}.{kind}")
        return self._classes.get(kind)

    def loaded(self) -> list[type[BaseModel]]:
        """Return the classes of the kinds whose files were imported."""
        return list(self._classes.values())

    def every(self) -> dict[str, type[BaseModel]]:
        """Import every file of the package, and return the classes of all kinds by name.

        A file that lacks a package has no kind to choose here; ``find`` says what it lacks.
        """
        for file in iter_modules(import_module(self.package).__path__):
            with suppress(ImportError):
                import_module(f"{self.package}.{file.name}")
        return dict(sorted(self._classes.items()))

    def having(self, field: str) -> list[type[BaseModel]]:
        """Return the classes with a field of that name: of the kinds imported, or else of all there
        are.
        """
        for classes in (self.loaded, lambda: list(self.every().values())):
            if found := [cls for cls in classes() if field in cls.model_fields]:
                return found
        return []

    def validate(self, raw: Any, handler: Any) -> BaseModel:
        """Read a section as its kind; a pydantic "wrap" validator of the field that holds the
        section.

        Raises:
            ValidationError: no such kind, no mapping, or fields that its class refuses.
        """
        if isinstance(raw, BaseModel):
            return raw
        if not isinstance(raw, dict):
            found: BaseModel = handler(raw)
            return found
        kind = raw.get(self.tag, self.default)
        if kind is None and self.tag not in raw:
            missing = InitErrorDetails(type="missing", loc=(self.tag,), input=raw)
            raise ValidationError.from_exception_data(self.section, [missing])
        cls = self.find(kind) if isinstance(kind, str) else None
        if cls is None:
            there_are = list(self.every())
            close = nearest(str(kind), there_are, 0.5)
            hint = f"; did you mean {close}?" if close else "."
            message = f"no such {self.tag}{hint} There are: {', '.join(there_are)}"
            problem = PydanticCustomError("no_such_kind", "{message}", {"message": message})
            place = InitErrorDetails(type=problem, loc=(self.tag,), input=kind)
            raise ValidationError.from_exception_data(self.section, [place])
        return cls.model_validate(raw)


def resolved(name: str) -> Any:
    """Return what ``package.module:name`` names, imported only now: how a section reaches what lies
    above it.
    """
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
