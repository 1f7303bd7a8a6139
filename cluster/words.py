"""Counts, sizes and lengths of time as people read them."""


def counted(number: int, what: str, plural: str = "s") -> str:
    return f"{number:,} {what}{'' if number == 1 else plural}"


def size(count: int) -> str:
    """Bytes in MB, GB or TB (powers of 1000)."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return f"{count / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 40 s, 12 min, 3.5 h, 6.2 days."""
    for limit, unit, name in ((120, 1, "s"), (3600, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.3g} days"


def ago(seconds: float) -> str:
    """A length of time as people say it: 40 s, 12 min, 5 h, 3 days."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
