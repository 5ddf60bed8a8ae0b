"""What a host allows: robots.txt (RFC 9309), and what pages say of themselves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lxml import etree, html
from protego import Protego

from data_pipeline.collector.fetching import Answer
from data_pipeline.readers.streams import DamageError
from data_pipeline.readers.warc import unpacked_body

LARGEST_ROBOTS = 500 * 1024
"""Bytes; RFC 9309 asks for at least as many, and what comes after may be ignored."""
REDIRECTS = 5
"""That are followed on the way to a robots.txt."""
ROBOTS_LIFE_S = 24 * 3600.0
"""Seconds for which a robots.txt counts."""
MOST_LINKS = 10_000
"""Links of one page that are followed."""


@dataclass(frozen=True)
class Rules:
    """What a host allows.

    Args:
        text: its robots.txt; None where nothing may be asked for, as the file cannot be had.
        agent: who asks.
    """

    text: str | None
    agent: str

    @classmethod
    def of(cls, answer: Answer, agent: str) -> "Rules":
        """A file that is not there allows all; a server that fails allows nothing until it is well (section 2.3.1)."""
        if answer.status == 200 and not answer.fault:
            try:
                content = unpacked_body(answer.body, answer.header("content-encoding"))
            except DamageError:
                return cls(None, agent)
            return cls(content[:LARGEST_ROBOTS].decode("utf-8", "replace"), agent)
        return cls("" if 400 <= answer.status < 500 and answer.status != 429 else None, agent)

    @property
    def parsed(self) -> Protego:
        return Protego.parse(self.text or "")

    def allow(self, url: str) -> bool:
        return self.text is not None and self.parsed.can_fetch(url, self.agent)

    @property
    def delay_s(self) -> float:
        """Seconds that it asks for between two requests."""
        rules = self.parsed
        rate = rules.request_rate(self.agent)
        try:
            between = rate.seconds / rate.requests if rate and rate.requests else 0.0
        except OverflowError:
            between = math.inf
        return max(rules.crawl_delay(self.agent) or 0.0, between)


@dataclass(frozen=True)
class Page:
    """What a page says to collectors.

    Args:
        links: addresses, as they are written.
        base: what they are relative to.
        kept: whether it may be kept.
        followed: whether its links may be followed.
    """

    links: list[str]
    base: str
    kept: bool
    followed: bool


def page(content: str, url: str, headers: Sequence[str], agent: str) -> Page:
    """Read a page's links and its wishes (`robots` or our name in meta elements, and X-Robots-Tag).

    Args:
        content: HTML; empty for another sort of content.
        url: its address.
        headers: values of X-Robots-Tag.
        agent: who reads.
    """
    parser = html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    try:
        tree = etree.fromstring(content.encode("utf-8", "replace"), parser=parser)
    except (etree.LxmlError, ValueError):
        tree = None
    said, base, links = list(headers), url, []
    if tree is not None:
        names = ("robots", agent.lower())
        said += [meta.get("content", "") for meta in tree.iter("meta") if meta.get("name", "").strip().lower() in names]
        base = next(iter(tree.xpath("//base/@href")), url)
        links = tree.xpath("//a[@href and not(contains(@rel,'nofollow'))]/@href")[:MOST_LINKS]
    words = {word.strip().lower() for value in said for word in value.split(",")}
    wishes = {word.removeprefix(f"{agent.lower()}:").strip() for word in words}
    return Page(links, base, kept=not wishes & {"noindex", "none"}, followed=not wishes & {"nofollow", "none"})
