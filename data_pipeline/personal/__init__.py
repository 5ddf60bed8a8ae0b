"""Personal data and secrets: where they stand in a text, and of which kind.

Patterns say where to look, rules with a meaning decide: check digits (python-stdnum), numbering plans (phonenumbers),
address registries (ipaddress), the list of top-level domains (tldextract). Every pattern is bounded and begins at the
beginning of a word, so that the time grows with the length of the text whatever stands in it.

Left as they are, on purpose: addresses and numbers that belong to nobody (example.com, 192.0.2.1, 555-0123), private
networks and public resolvers, and mailboxes of machines (git@, noreply@).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.personal.banking import cards, ibans
from data_pipeline.personal.emails import emails
from data_pipeline.personal.identifiers import national_ids
from data_pipeline.personal.networks import ips
from data_pipeline.personal.phones import phones
from data_pipeline.personal.secrets import assignments, key_blocks, tokens, url_passwords
from data_pipeline.personal.spans import Span, replaced

Detector = Callable[[str, Sequence[str]], Iterator[Span]]
DETECTORS: dict[str, tuple[Detector, ...]] = {
    "secret": (key_blocks, tokens, url_passwords, assignments),
    "email": (emails,),
    "iban": (ibans,),
    "card": (cards,),
    "national_id": (national_ids,),
    "phone": (phones,),
    "ip": (ips,),
}
"""Kinds in the order in which they are looked for: what one has claimed, none after it sees."""
KINDS = tuple(DETECTORS)
FILLER = "\0"
"""Stands where a kind has been found, while the kinds after it are looked for."""


@dataclass(frozen=True)
class Found:
    """One thing found.

    Args:
        kind: of KINDS.
        begin: its first character.
        end: the character after its last.
    """

    kind: str
    begin: int
    end: int


def find(text: str, kinds: Sequence[str] = KINDS, regions: Sequence[str] = ("US", "GB")) -> list[Found]:
    """All that is found, in the order of the text, without overlaps.

    Args:
        text: where to look.
        kinds: what to look for, of KINDS.
        regions: countries (ISO 3166, two letters) whose phone numbers are known without their international prefix.
    """
    found = []
    for kind in KINDS:
        if kind not in kinds:
            continue
        for detector in DETECTORS[kind]:
            spans = list(detector(text, regions))
            found += [Found(kind, *span) for span in spans]
            text = replaced(text, spans, lambda begin, end: FILLER * (end - begin))
    return sorted(found, key=lambda one: one.begin)
