"""Addresses of machines that are somewhere: IP, versions 4 and 6."""

import ipaddress
import re
from collections.abc import Iterator, Sequence

from data_pipeline.personal.spans import CUE, Span

IPV4 = re.compile(r"\d(?<![\w.,/@-]\d)\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?![\w@-]|\.\w|/\d)")
IPV6 = re.compile(r"[23](?<![\w:.][23])[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{3,34}(?![\w:]|/\d)")
VERSION = re.compile(
    r"(?:\b(?:v|rev|build|sections?|chapters?|clauses?|figures?|tables?|steps?)|(?:version|release)\w{0,9}"
    r"|[=<>~!^]=|[~^§])[\s:=\"'(]{0,5}$",
    re.IGNORECASE,
)
RESOLVERS = frozenset({"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "208.67.222.222", "208.67.220.220"})
LEAST_PART = 20
"""An IPv4 address whose parts are all less is rather a version; one public address in 2,000 is."""
LEAST_GROUPS = 3
"""Groups of digits in an IPv6 address; `2000::2` is rather a slice."""


def ips(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Public addresses, versions 4 and 6; numbers of versions and sections look the same but for the word before."""
    found = []
    for match in IPV4.finditer(text):
        plausible = max(map(int, match[0].split("."))) >= LEAST_PART
        if plausible and match[0] not in RESOLVERS and is_public(match[0]):
            before = VERSION.search(text, max(0, match.start() - CUE), match.start())
            if before is None:
                found.append(match.span())
    for match in IPV6.finditer(text):
        if sum(map(bool, match[0].split(":"))) >= LEAST_GROUPS and is_public(match[0]):
            found.append(match.span())
    yield from sorted(found)


def is_public(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return found.is_global and not found.is_multicast
