import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.clean.pii import mask_emails, mask_ips, mask_phones

PARTS = [
    "a",
    "b.c",
    "@",
    ".",
    "..",
    "com",
    "x.org",
    "-",
    "_",
    ":",
    "::",
    "2",
    "555",
    "(",
    ")",
    " ",
    "\n",
    "<EMAIL>",
    "é",
]
NUMBERS = [
    "+44 20 7946 0958",
    "(212) 555-0123",
    "212-555-0123",
    "8.8.8.8",
    "10.0.0.1",
    "2001:4860:4860::8888",
]
PIECES = st.lists(st.sampled_from(PARTS + NUMBERS), max_size=30).map("".join)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to jane.doe+news@mail.example.co.uk.", "Write to <EMAIL>."),
        ("<a@b.de>,c_d@e-f.org", "<<EMAIL>>,<EMAIL>"),
        ("mailto:x@y.museum?subject=hi", "mailto:<EMAIL>?subject=hi"),
        ("a@b.com@c.org", "<EMAIL>@c.org"),
        ("x" * 200 + "@y.org", "x" * 136 + "<EMAIL>"),
        *[
            (text, text)
            for text in (
                "@decorator.of_python",
                "user@localhost",
                "5 @ 3.50",
                "a@b.c",
                "//@x.org",
                "@@x.org",
            )
        ],
    ],
)
def test_emails(text: str, masked: str) -> None:
    assert mask_emails(text) == (masked, masked.count("<EMAIL>"))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("ping 8.8.8.8.", "ping <IP>."),
        ("http://93.184.216.34:80/", "http://<IP>:80/"),
        ("2001:4860:4860::8888, 2a00:1450:4001:0812:0000:0000:0000:200e: up", "<IP>, <IP>: up"),
        *[
            (text, text)
            for text in (
                "127.0.0.1 10.0.0.1 192.168.1.1 0.0.0.0 169.254.0.1",
                "256.1.1.1 8.8.8.08 1.2.3.4.5 v8.8.8.8 8.8.8.8a 8.8.8",
                "2001:db8::1 fe80::1 ::1 std::vector a::b 12:30:45 2001:30:45",
            )
        ],
    ],
)
def test_addresses(text: str, masked: str) -> None:
    assert mask_ips(text) == (masked, masked.count("<IP>"))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (
            "call +1 (212) 555-0123, +44 20 7946 0958 or +4915112345678.",
            "call <PHONE>, <PHONE> or <PHONE>.",
        ),
        ("(212) 555-0123; 212-555-0123", "<PHONE>; <PHONE>"),
        *[
            (text, text)
            for text in (
                "2125550123 1234567890123 555-0123 2024-01-31 112-555-0123 212-155-0123",
                "+1.2345 +0.12 +12345 3+12345678 +123456789012345678 1-212-555-0123-9",
            )
        ],
    ],
)
def test_telephone_numbers(text: str, masked: str) -> None:
    assert mask_phones(text) == (masked, masked.count("<PHONE>"))


@given(st.one_of(PIECES, st.text()))
@example("+12 34567890(212) 555-0123")
@example("a@b.com_c@d.org@")
def test_masking_again_changes_nothing(text: str) -> None:
    for mask in (mask_emails, mask_ips, mask_phones):
        text, _ = mask(text)
    for mask in (mask_emails, mask_ips, mask_phones):
        assert mask(text) == (text, 0)


@given(PIECES)
def test_no_email_is_left(text: str) -> None:
    plain = re.compile(
        r"[A-Za-z0-9][A-Za-z0-9._+-]*@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,63}(?![A-Za-z0-9-])"
    )
    assert not plain.search(mask_emails(text)[0])
