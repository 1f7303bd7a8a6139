"""Masks for what identifies a person: e-mail addresses, public IP addresses and telephone numbers.

Every search is linear in the text, whatever the text, and masking what was masked changes nothing.
"""

import ipaddress
import re
from collections.abc import Callable

_DOMAIN = re.compile(r"@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z][A-Za-z0-9-]{1,62}(?![A-Za-z0-9-])")
_LOCAL_PART = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.!#$%&'*+/=?^_`{|}~-"
_LOCAL_CHARS = 64  # RFC 5321, 4.5.3.1.1
# Each begins with the few characters that can begin it, which is what a fast search needs, and
# looks back after them.
_IPV4 = re.compile(r"[0-9](?<![\w.].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?!\w|\.[0-9])")
# Of IPv6 only what is assigned to the public so far, 2000::/3: C++'s a::b is an address too.
_IPV6 = re.compile(
    r"[23](?<![\w:.].)[0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){1,6}:[0-9A-Fa-f]{0,4}(?<!:)(?!\w|:[0-9A-Fa-f:])"
)
_PHONE = re.compile(
    r"[+(2-9](?<![\w.+-].)(?:"
    r"(?<=\+)[1-9][0-9]{0,2}[ -]?(?:\([0-9]{1,4}\)[ -]?)?[0-9]{2,4}(?:[ -]?[0-9]{2,4}){1,4}"
    r"|(?<=\()[2-9][0-9]{2}\) ?[2-9][0-9]{2}-[0-9]{4}"
    r"|(?<=[2-9])[0-9]{2}-[2-9][0-9]{2}-[0-9]{4}"
    r")(?![\w(+-]|\.[0-9])"
)


def mask_ips(text: str) -> tuple[str, int]:
    """Put <IP> for each address, v4 or v6, of the public internet; return also how many there
    were."""
    text, fours = _masked(_IPV4, "<IP>", _is_public, text)
    text, sixes = _masked(_IPV6, "<IP>", _is_public, text)
    return text, fours + sixes


def mask_phones(text: str) -> tuple[str, int]:
    """Put <PHONE> for each telephone number; return also how many there were.

    Numbers that begin with + and have 8 to 15 digits (ITU-T E.164), and North American ones written
    (212) 555-0123 or 212-555-0123: others look like any number.
    """
    return _masked(_PHONE, "<PHONE>", _is_phone, text)


def _masked(
    pattern: re.Pattern[str], mask: str, valid: Callable[[str], bool], text: str
) -> tuple[str, int]:
    count = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal count
        if not valid(match[0]):
            return match[0]
        count += 1
        return mask

    return pattern.sub(replace, text), count


def mask_emails(text: str) -> tuple[str, int]:
    """Put <EMAIL> for each e-mail address; return also how many there were."""
    parts: list[str] = []
    end = count = 0
    # From each @ with a domain back over what may stand before it: a search for the local part
    # would be quadratic.
    for match in _DOMAIN.finditer(text):
        before = text[max(end, match.start() - _LOCAL_CHARS) : match.start()]
        local = before[len(before.rstrip(_LOCAL_PART)) :].lstrip(".")
        if any(map(str.isalnum, local)):
            parts += [text[end : match.start() - len(local)], "<EMAIL>"]
            end = match.end()
            count += 1
    return "".join([*parts, text[end:]]), count


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _is_phone(number: str) -> bool:
    return not number.startswith("+") or 8 <= sum(map(str.isdigit, number)) <= 15
