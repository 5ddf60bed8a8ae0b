"""What is known of pages and hosts, in SQLite: a round that is killed at any moment goes on where it was."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.collector.addresses import host_of

SCHEMA = """
CREATE TABLE IF NOT EXISTS pages (
    url TEXT PRIMARY KEY, host TEXT NOT NULL, depth INTEGER NOT NULL, state TEXT NOT NULL DEFAULT 'due',
    detail TEXT NOT NULL DEFAULT '', tries INTEGER NOT NULL DEFAULT 0, not_before REAL NOT NULL DEFAULT 0,
    asked REAL NOT NULL DEFAULT 0, etag TEXT NOT NULL DEFAULT '', modified TEXT NOT NULL DEFAULT '',
    digest TEXT NOT NULL DEFAULT '', stored TEXT NOT NULL DEFAULT '');
CREATE INDEX IF NOT EXISTS due ON pages (state, host, depth);
CREATE TABLE IF NOT EXISTS hosts (
    host TEXT PRIMARY KEY, robots TEXT, asked REAL NOT NULL DEFAULT 0, tries INTEGER NOT NULL DEFAULT 0,
    not_before REAL NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS rounds (
    name TEXT PRIMARY KEY, ended REAL NOT NULL DEFAULT 0, file INTEGER NOT NULL DEFAULT 0,
    size INTEGER NOT NULL DEFAULT 0, asked INTEGER NOT NULL DEFAULT 0, stored INTEGER NOT NULL DEFAULT 0,
    unchanged INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0);
"""


@dataclass(frozen=True)
class Known:
    """What is known of a page.

    Args:
        url: its address.
        host: of the address.
        depth: links from a seed.
        tries: how often it was asked for in vain in this round.
        etag: validator of the stored version; empty if none.
        modified: likewise, a date.
        digest: of the stored version; empty if none.
        stored: when that was stored, as WARC writes it.
    """

    url: str
    host: str
    depth: int
    tries: int
    etag: str
    modified: str
    digest: str
    stored: str


class Frontier:
    """Pages that are due, done or given up, hosts and rounds.

    Args:
        file: the data base.
    """

    def __init__(self, file: Path):
        self._base = sqlite3.connect(file, isolation_level=None)
        self._base.row_factory = sqlite3.Row
        self._base.execute("PRAGMA journal_mode=WAL")
        self._base.executescript(SCHEMA)

    def close(self) -> None:
        self._base.close()

    @contextmanager
    def together(self) -> Iterator[None]:
        """All that is noted down within, or nothing of it."""
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._base.execute("ROLLBACK")
            raise
        self._base.execute("COMMIT")

    def round(self) -> dict[str, Any] | None:
        """The round that has not ended."""
        row = self._base.execute("SELECT * FROM rounds WHERE ended = 0").fetchone()
        return dict(row) if row else None

    def begin(self, name: str, older_than_s: float) -> None:
        """A new round: pages that were last asked for before that time are due again."""
        self._base.execute("INSERT OR IGNORE INTO rounds (name) VALUES (?)", [name])
        self._base.execute("UPDATE pages SET state = 'due' WHERE asked <= ?", [older_than_s])
        self._base.execute("UPDATE pages SET tries = 0, not_before = 0, detail = '' WHERE state = 'due'")
        self._base.execute("UPDATE hosts SET tries = 0, not_before = 0")

    def note_round(self, name: str, **facts: Any) -> None:
        self._set("rounds", "name", name, facts)

    def add(self, url: str, depth: int) -> None:
        """A page that a seed or link leads to; one that is known keeps the shorter way."""
        self._base.execute(
            "INSERT INTO pages (url, host, depth) VALUES (?, ?, ?) "
            "ON CONFLICT (url) DO UPDATE SET depth = min(depth, excluded.depth)",
            [url, host_of(url), depth],
        )
        self.note_unseen(host_of(url))

    def note_unseen(self, host: str) -> None:
        """A host that may be new."""
        self._base.execute("INSERT OR IGNORE INTO hosts (host) VALUES (?)", [host])

    def note(self, url: str, **facts: Any) -> None:
        self._set("pages", "url", url, facts)

    def note_host(self, host: str, **facts: Any) -> None:
        self._set("hosts", "host", host, facts)

    def give_up(self, host: str, state: str, detail: str) -> None:
        """All pages of a host that are due get another state."""
        self._base.execute(
            "UPDATE pages SET state = ?, detail = ? WHERE host = ? AND state = 'due'", [state, detail, host]
        )

    def hosts(self) -> list[dict[str, Any]]:
        """The hosts of pages that are due, with when the first page and the host may be asked next."""
        rows = self._base.execute(
            "SELECT hosts.*, max(hosts.not_before, min(pages.not_before)) AS ready FROM hosts "
            "JOIN pages ON pages.host = hosts.host AND pages.state = 'due' GROUP BY hosts.host ORDER BY ready"
        )
        return [dict(row) for row in rows]

    def host(self, host: str) -> dict[str, Any]:
        """What is known of a host: robots.txt, when that was asked for, tries in vain, when it may be asked next."""
        return dict(self._base.execute("SELECT * FROM hosts WHERE host = ?", [host]).fetchone())

    def next(self, host: str, now_s: float) -> Known | None:
        """The page of a host that is due, those near a seed first."""
        columns = ", ".join(Known.__dataclass_fields__)
        row = self._base.execute(
            f"SELECT {columns} FROM pages WHERE state = 'due' AND host = ? AND not_before <= ? "  # noqa: S608  our names
            "ORDER BY depth, rowid LIMIT 1",
            [host, now_s],
        ).fetchone()
        return Known(**row) if row else None

    def states(self) -> dict[str, int]:
        """State -> pages."""
        rows = self._base.execute("SELECT state, count(*) FROM pages GROUP BY state ORDER BY state")
        return {state: count for state, count in rows}

    def rounds(self) -> list[dict[str, Any]]:
        return [dict(row) for row in self._base.execute("SELECT * FROM rounds ORDER BY name")]

    def _set(self, table: str, key: str, value: str, facts: dict[str, Any]) -> None:
        columns = ", ".join(f"{name} = ?" for name in facts)
        change = f"UPDATE {table} SET {columns} WHERE {key} = ?"  # noqa: S608  names of ours; values are bound
        self._base.execute(change, [*facts.values(), value])
