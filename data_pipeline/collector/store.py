"""The raw store: what servers sent, as WARC, in a directory per round that is named by its date.

    raw/2026-11-24T195000Z/00000.warc.gz

Pages that have not changed since an earlier round are there as "revisit" records, so that a corpus of the whole store
has each version of a page once.
"""

import hashlib
import io
import os
import uuid
from base64 import b32encode
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from conf.errors import LongrunError
from data_pipeline.collector.fetching import Answer

LARGEST_WARC = 2**30
"""Bytes after which a new file is begun."""
UNCHANGED = "http://netpreserve.org/warc/1.1/revisit/server-not-modified"
SAME = "http://netpreserve.org/warc/1.1/revisit/identical-payload-digest"
REPLACED = ("transfer-encoding", "content-length")
"""Headers that do not hold of the body as it is stored; they get a prefix."""


class StoreError(LongrunError):
    """A round cannot be stored, or gone on with."""


def written_date(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def digest_of(body: bytes) -> str:
    return "sha1:" + b32encode(hashlib.sha1(body, usedforsecurity=False).digest()).decode()


@dataclass(frozen=True)
class Version:
    """What was stored of a page at an earlier time.

    Args:
        digest: of its body.
        date: when, as WARC writes it.
    """

    digest: str
    date: str


class Store:
    """The files of one round, appended to record by record.

    Args:
        directory: of the round.
        agent: who collects, for the first record of each file.
    """

    def __init__(self, directory: Path, agent: str):
        self.directory = directory
        self.agent = agent
        directory.mkdir(parents=True, exist_ok=True)

    def resume(self, number: int, size: int) -> None:
        """Cut off what a killed round wrote after the last record that it noted down.

        Args:
            number: of the last file.
            size: of that file, in bytes.

        Raises:
            StoreError: the file is shorter than that.
        """
        for file in sorted(self.directory.glob("*.warc.gz")):
            if int(file.name[:5]) > number:
                file.unlink()
        last = self._file(number)
        there = last.stat().st_size if last.exists() else 0
        if there < size:
            raise StoreError(f"{last} has {there:,} bytes of the {size:,} that were stored; put it back, or begin anew")
        if there > size:
            with open(last, "r+b") as stream:
                stream.truncate(size)

    def append(
        self, answer: Answer, time_s: float, place: tuple[int, int], same: Version | None = None
    ) -> tuple[int, int]:
        """Write one answer, and see that it is on the disk.

        Args:
            answer: what a server sent.
            time_s: when, as UNIX time.
            place: number of the last file and its size.
            same: the version that it is equal to; None for a new one.

        Returns:
            The place after it.
        """
        number, size = place
        if size > LARGEST_WARC:
            number, size = number + 1, 0
        content = io.BytesIO()
        writer = WARCWriter(content, gzip=True)
        date = written_date(time_s)
        if size == 0:
            facts = {"software": self.agent, "format": "WARC File Format 1.1"}
            writer.write_record(writer.create_warcinfo_record(self._file(number).name, facts))
        headers = [(f"X-Crawl-{k}" if k.lower() in REPLACED else k, v) for k, v in answer.headers]
        headers.append(("Content-Length", str(len(answer.body))))
        http = StatusAndHeaders(f"{answer.status} {answer.reason}".strip(), headers, protocol="HTTP/1.1")
        named = {"WARC-Date": date, "WARC-Record-ID": f"<urn:uuid:{uuid.uuid4()}>"}
        if same:
            record = writer.create_revisit_record(answer.url, same.digest, answer.url, same.date, http, named)
            record.rec_headers.replace_header("WARC-Profile", UNCHANGED if answer.status == 304 else SAME)
        else:
            record = writer.create_warc_record(
                answer.url, "response", io.BytesIO(answer.body), http_headers=http, warc_headers_dict=named
            )
        writer.write_record(record)
        with open(self._file(number), "ab") as stream:
            stream.write(content.getvalue())
            stream.flush()
            os.fsync(stream.fileno())
        return number, size + len(content.getvalue())

    def _file(self, number: int) -> Path:
        return self.directory / f"{number:05d}.warc.gz"
