"""Telephone numbers."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from data_pipeline.personal.spans import Span, cued, longest

PHONE = re.compile(
    r"[+(\d](?<![\w.,:/+-][+(\d])(?:(?<=\d)|\+?(?=\d))"
    r"(?:(?:\)[ .-]?|[ .-]?\(|[ ./-])?\d){6,14}(?!\w|[.,:/-]\d|\s?[*^%])"
)
PHONE_CUE = re.compile(
    r"\b(?:tel|(?:tele)?phone|call|fax|mobile|cell|whatsapp|sms|text|dial|hotline)|[☎☏📞📱]", re.IGNORECASE
)
FICTION = re.compile(r"\+1\d{3}55501\d\d|\+44(?:1632960|1\d\d4960|2079460|7700900|8081570)\d{3}")
"""Numbers that nobody is given: NANP 555-0100 to 555-0199, Ofcom's numbers for drama."""
LEAST_DIGITS = 7
MOST_GROUPS = 7
LINES = ("fixed_line", "mobile", "toll_free", "premium_rate", "shared_cost", "personal_number", "voip", "uan")


def phones(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """International numbers with +, and those of the regions if written as there, or if a word says so."""
    return longest(text, PHONE, lambda begin, end: is_phone(text, begin, end, regions))


def is_phone(text: str, begin: int, end: int, regions: Sequence[str]) -> bool:
    """Whether a number is given out, and is no other number that happens to look like it."""
    import phonenumbers

    written = text[begin:end]
    if written.count(" ") >= MOST_GROUPS:
        return False
    groups = re.findall(r"\d+", written)
    digits = "".join(groups)
    if len(digits) < LEAST_DIGITS or len(groups[-1]) < 2 or written.count("(") != written.count(")"):
        return False
    if "+" in written:
        possible = ["ZZ"]
    else:
        named = cued(text, begin, PHONE_CUE)
        possible = [region for region in regions if (named or len(groups) > 1) and dialled(region).fullmatch(digits)]
    for region in possible:
        try:
            number = phonenumbers.parse(written, region)
        except phonenumbers.NumberParseException:
            continue
        if not phonenumbers.is_valid_number(number):
            continue
        if FICTION.fullmatch(phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)):
            return False
        if region == "ZZ" or named or as_written_there(groups, number):
            return True
    return False


@cache
def dialled(region: str) -> re.Pattern[str]:
    """The digits of a country's numbers, with and without its trunk prefix: a quick look before parsing."""
    import phonenumbers

    plan: Any = phonenumbers.PhoneMetadata.metadata_for_region(region)
    patterns = [getattr(plan, name) for name in LINES]
    found = "|".join(one.national_number_pattern for one in patterns if one and one.national_number_pattern)
    return re.compile(f"(?:{plan.national_prefix_for_parsing or plan.national_prefix or ''})?(?:{found})")


def as_written_there(groups: list[str], number: Any) -> bool:
    """Whether digits are grouped as the country does, in two groups or more."""
    import phonenumbers

    usual = re.findall(r"\d+", phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.NATIONAL))
    return len(groups) > 1 and groups in (usual, [str(number.country_code), *usual])
