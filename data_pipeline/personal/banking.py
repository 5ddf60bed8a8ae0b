"""Bank accounts and payment cards."""

import re
from collections.abc import Iterator, Sequence

from data_pipeline.personal.spans import Span, longest

IBAN = re.compile(r"[A-Z](?<!\w[A-Z])[A-Z]\d{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,3})?(?!\w)")
CARD = re.compile(r"\d(?<![\w.,+-]\d)\d{3}(?:[ -]?\d){9,15}(?!\w|[.,-]\d)")
NETWORKS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|(?:6011|64[4-9]\d|65\d\d|62\d\d)\d{12,15}"  # Discover, UnionPay
    r"|(?:30[0-5]|309|36\d|38\d|39\d)\d{11}"  # Diners Club
    r"|35(?:2[89]|[3-8]\d)\d{12}"  # JCB
)
"""Prefixes and lengths that payment networks issue (ISO/IEC 7812)."""
CARD_GROUPS = ((4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3), (4, 4, 4, 1))


def ibans(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """International bank account numbers: length by country, check digits modulo 97 (ISO 13616)."""
    from stdnum import iban

    for match in IBAN.finditer(text):
        # Words in capitals may follow; they are cut off group by group.
        value = match[0]
        while value and not iban.is_valid(value):
            value = value[: max(value.rfind(" "), value.rfind("-"), 0)]
        if value:
            yield match.start(), match.start() + len(value)


def cards(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Numbers of payment cards: digits together or grouped as on the card, issued prefix, Luhn's check digit."""

    def is_card(begin: int, end: int) -> bool:
        groups = re.split(r"[ -]", text[begin:end])
        digits = "".join(groups)
        grouped = len(groups) == 1 or tuple(map(len, groups)) in CARD_GROUPS
        return grouped and NETWORKS.fullmatch(digits) is not None and luhn(digits)

    return longest(text, CARD, is_card)


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    total = sum(sum(divmod(int(digit) * (2 if place % 2 else 1), 10)) for place, digit in enumerate(reversed(digits)))
    return total % 10 == 0
