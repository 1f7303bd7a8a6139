"""The classes of a set out of the labels that were found: names, numbers, or both."""

from collections.abc import Iterable, Mapping, Sequence

from data_prep.images.findings import refuse_unknown_class
from data_prep.images.raw import Label

MAX_CLASSES = 1 << 20


def class_list(
    labels: Mapping[Label, str], declared: Iterable[tuple[str, ...]], before: Sequence[str] = ()
) -> list[str]:
    """Return the names of the classes; a class's place is its number.

    1. `declared`, lists of names that files tell, if there are any: they are the classes.
    2. Numbers: the classes are "0" to the largest number. 3. Names: sorted, as torchvision's
    ImageFolder does. The classes of a set that is appended to, `before`, come first.

    Args:
        labels: each label that was found, with a place where.

    Raises ValueError for labels that no class has, for several lists that differ, and for names
    beside numbers where no list tells what the numbers are.
    """
    names = _declared(declared)
    numbers = [label for label in labels if isinstance(label, int)]
    words = sorted(label for label in labels if isinstance(label, str))
    if names:
        for label, place in labels.items():
            if label not in names if isinstance(label, str) else not 0 <= label < len(names):
                refuse_unknown_class(label, place, names)
    elif numbers and words:
        number, word = numbers[0], words[0]
        raise ValueError(
            f"found labels that are numbers ({number}, {labels[number]}) and labels that are names "
            f"({word!r}, {labels[word]}), and no list of class names; prepare them as sets of "
            "their own, or rename the classes"
        )
    elif numbers:
        for number in (min(numbers), max(numbers)):
            if not 0 <= number < MAX_CLASSES:
                raise ValueError(
                    f"{labels[number]}: label {number} has no class, expected 0 to "
                    f"{MAX_CLASSES - 1:,}; correct the label, or leave the image out"
                )
        names = [str(number) for number in range(max(numbers) + 1)]
    else:
        names = words
    known = set(before)
    return [*before, *(name for name in names if name not in known)]


def class_name(label: Label, declared: Iterable[tuple[str, ...]]) -> str:
    """Return the name of the class of a label; `declared` as for `class_list`."""
    names = _declared(declared) if isinstance(label, int) else []
    return names[label] if isinstance(label, int) and 0 <= label < len(names) else str(label)


def _declared(declared: Iterable[tuple[str, ...]]) -> list[str]:
    """Return the one list of names that files tell, or []."""
    lists = list(dict.fromkeys(names for names in declared if names))
    if len(lists) > 1:
        one, two = lists[0], lists[1]
        raise ValueError(
            f"two files name their classes differently: {len(one):,} from {one[0]!r} to "
            f"{one[-1]!r}, and {len(two):,} from {two[0]!r} to {two[-1]!r}; prepare them as sets "
            "of their own"
        )
    return list(lists[0]) if lists else []
