"""E-mail addresses."""

import re
from collections.abc import Iterator, Sequence
from functools import cache

from data_pipeline.personal.spans import Span

LOCAL = re.compile(r"[\w!#$%&'*+/=?^`{|}~.-]{1,65}")
LONGEST_LOCAL = 64
"""Characters before the @ (RFC 5321, section 4.5.3.1)."""
DOMAIN = re.compile(r"@((?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,6}([^\W\d_]{2,24}))(?![\w@]|-\w|\.\w)")
RESERVED = re.compile(r"(?:^|\.)(?:example(?:\.(?:com|net|org))?|test|invalid|localhost|local)$", re.IGNORECASE)
"""Domains of nobody (RFC 2606, RFC 6762)."""
MACHINES = frozenset({"git", "noreply", "no-reply", "donotreply", "do-not-reply", "mailer-daemon"})


@cache
def top_level_domains() -> frozenset[str]:
    """As they were when tldextract was packed; nothing is fetched."""
    import tldextract

    suffixes = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None).tlds
    return frozenset(suffix.rsplit(".", 1)[-1] for suffix in suffixes)


def emails(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Addresses under a top-level domain that exists."""
    for match in DOMAIN.finditer(text):
        at = match.start()
        before = LOCAL.match(text[max(0, at - LONGEST_LOCAL - 1) : at][::-1])
        if before is None or match[2].lower() not in top_level_domains() or RESERVED.search(match[1]):
            continue
        local = before[0][::-1].lstrip("'`{|/=*.-?&#")
        if 1 <= len(local) <= LONGEST_LOCAL and not local.endswith(".") and local.lower() not in MACHINES:
            yield at - len(local), match.end()
