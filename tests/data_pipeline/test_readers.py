"""Readers and bad input: whatever is wrong with the bytes is a fault that is counted, and never ends the reading."""

import gzip
import io
import json
import random
import resource
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import orjson
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from data_pipeline.readers import archives, extraction, streams
from data_pipeline.readers.reading import PASSED_OVER, FileReader, Origin, iso, record_document
from data_pipeline.sources.base import Fields, FileSource, SourceError
from data_pipeline.sources.exports import Exports
from data_pipeline.sources.files import Files
from data_pipeline.sources.html import Html
from data_pipeline.sources.jsonl import JsonLines
from data_pipeline.sources.parquet import Parquet
from data_pipeline.sources.repositories import Repositories
from data_pipeline.sources.warc import Warc

TEXTS = [
    f"Text {number} is about the number {number * number}, and about nothing else in the world." for number in range(8)
]
RECORDS = b"".join(json.dumps({"text": text, "id": f"r{n}"}).encode() + b"\n" for n, text in enumerate(TEXTS))


def page(text: str) -> str:
    return (
        "<html><head><title>A page</title><meta charset=utf-8></head><body><nav>Home | About</nav>"
        f"<article><h1>Heading</h1><p>{text}</p><p>{text}</p></article></body></html>"
    )


def read(source: FileSource, directory: Path) -> list:
    (reader,) = source.readers(directory)
    return list(reader.run())


def warc(texts: list[str], packed: bool = False, kind: str = "response") -> bytes:
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=packed)
    for number, text in enumerate(texts):
        uri = f"http://example.org/{number}"
        named = {"WARC-Record-ID": f"<urn:uuid:{number:032}>", "WARC-Date": "2026-01-02T03:04:05Z"}
        if kind == "response":
            head = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.1")
            payload = io.BytesIO(page(text).encode())
            record = writer.create_warc_record(uri, kind, payload, http_headers=head, warc_headers_dict=named)
        else:
            payload = io.BytesIO(text.encode())
            named["Content-Type"] = "text/plain"
            record = writer.create_warc_record(uri, kind, payload, warc_headers_dict=named)
        writer.write_record(record)
    return out.getvalue()


def tarred(texts: list[str], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for number, text in enumerate(texts):
            info = tarfile.TarInfo(f"notes/{number}.md")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


def zipped(members: dict[str, str | bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def parquet(texts: list[str]) -> bytes:
    out = io.BytesIO()
    table = pyarrow.table({"text": texts, "id": [f"r{n}" for n in range(len(texts))]})
    pyarrow.parquet.write_table(table, out, row_group_size=3)
    return out.getvalue()


@dataclass(frozen=True)
class Format:
    """What a reader reads.

    Args:
        name: of the file.
        content: a sound file of `TEXTS`, or of the first of them.
        source: what reads it.
        seams: after how many bytes a file may end without a sign that it was longer.
    """

    name: str
    content: bytes
    source: Callable[[str], FileSource]
    seams: tuple[int, ...] = ()

    def excuses(self, content: bytes, documents: list) -> bool:
        """Whether nobody could know that there was more: records were cut out between seams, or, in a format that does
        not pack, all texts of which there is something left came out."""
        ends = (*self.seams, len(self.content))
        seamless = any(content == self.content[:begin] + self.content[end:] for begin in ends for end in ends)
        left = [text for text in TEXTS if text.encode() in content]
        plain = bool(self.seams) and TEXTS[0].encode() in self.content
        return seamless or (plain and all(any(text in doc.text for doc in documents) for text in left))


def ends(content: bytes, mark: bytes) -> tuple[int, ...]:
    """Where the mark begins or ends in the content."""
    starts = [i for i in range(len(content)) if content.startswith(mark, i)]
    return tuple(sorted({0, *starts, *(i + len(mark) for i in starts)}))


CHATS = [
    {
        "title": f"Chat {number}",
        "id": f"c{number}",
        "create_time": 1_714_972_089.5,
        "current_node": "b",
        "mapping": {
            "root": {"message": None, "parent": None, "children": ["a"]},
            "a": {
                "message": {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["Say it."]}},
                "parent": "root",
                "children": ["b", "c"],
            },
            "b": {
                "message": {"author": {"role": "assistant"}, "content": {"parts": [text]}},
                "parent": "a",
                "children": [],
            },
            "c": {
                "message": {"author": {"role": "assistant"}, "content": {"parts": ["No."]}},
                "parent": "a",
                "children": [],
            },
        },
    }
    for number, text in enumerate(TEXTS)
]
FEW = TEXTS[:3]
"""Where each takes long."""
RESPONSES, CONVERSIONS, PACKED = warc(FEW), warc(TEXTS, kind="conversion"), warc(FEW, packed=True)
FORMATS = {
    "text": Format("x.md", f"---\ndate: 2024-05-06\n---\n{TEXTS[0]}".encode(), lambda p: Files([p])),
    "jsonl": Format("x.jsonl", RECORDS, lambda p: JsonLines([p]), ends(RECORDS, b"\n")),
    "jsonl.gz": Format("x.jsonl.gz", gzip.compress(RECORDS, mtime=0), lambda p: JsonLines([p], fields=Fields(id="id"))),
    "jsonl.zst": Format("x.jsonl.zst", zstandard.compress(RECORDS), lambda p: JsonLines([p])),
    "parquet": Format("x.parquet", parquet(TEXTS), lambda p: Parquet([p], fields=Fields(id="id"))),
    "html": Format("x.html", page(TEXTS[0]).encode(), lambda p: Html([p])),
    "warc": Format("x.warc", RESPONSES, lambda p: Warc([p]), ends(RESPONSES, b"\r\n\r\n")),
    "warc.gz": Format("x.warc.gz", PACKED, lambda p: Warc([p]), ends(PACKED, b"\x1f\x8b")),
    "wet": Format("x.wet", CONVERSIONS, lambda p: Warc([p]), ends(CONVERSIONS, b"\r\n\r\n")),
    "repository": Format(
        "x.py", f"text = {TEXTS[0]!r}\n".encode(), lambda p: Repositories([str(Path(p).parent)], licences=[])
    ),
    "export": Format("x.json", json.dumps(CHATS).encode(), lambda p: Exports([p])),
    "export.zip": Format("x.zip", zipped({"a/conversations.json": json.dumps(CHATS)}), lambda p: Exports([p])),
    "tar": Format("x.tar", tarred(TEXTS), lambda p: Files([p])),
    "tar.gz": Format("x.tar.gz", tarred(TEXTS, "w:gz"), lambda p: Files([p])),
    "zip": Format("x.zip", zipped({f"{n}.md": text for n, text in enumerate(TEXTS)}), lambda p: Files([p])),
}


INSERTED = (b"\xff", b"\0", b"\n", b'"', b"{" * 2000, b"<div>" * 300, b"9" * 30)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A copy with one to three changes, each of a sort that broken disks, cut transfers and malice make."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        at, length = draw.randrange(len(content) + 1), draw.choice((1, 2, 8, 64, 500))
        before, part, after = content[:at], content[at : at + length], content[at + length :]
        content = draw.choice(
            (
                before,
                before + after,
                before + draw.randbytes(len(part)) + after,
                before + bytes(len(part)) + after,
                before + part + part + after,
                before + draw.choice(INSERTED) + part + after,
                before + bytes(byte ^ 1 << draw.randrange(8) for byte in part[:1]) + part[1:] + after,
            )
        )
    return content


def check_mutations(form: Format, tmp_path: Path, count: int) -> None:
    """Every mutated file is read to documents, faults and numbers of what was passed over; none of it is lost."""
    file = tmp_path / form.name
    file.write_bytes(form.content)
    (reader,) = form.source(str(file)).readers(tmp_path)
    sound = [doc.text for doc in reader.run()]
    assert len(sound) in (1, 3, len(TEXTS)) and all(TEXTS[n] in text for n, text in enumerate(sound))
    extractor = extraction.Extractor()
    for seed in range(count):
        content = mutated(form.content, random.Random(seed))
        file.write_bytes(content)
        (reader,) = form.source(str(file)).readers(tmp_path)
        if isinstance(reader, extraction.PageReader):  # one process for all
            reader.extract = extractor
            documents = list(FileReader.run(reader))
        else:
            documents = list(reader.run())
        for doc in documents:
            orjson.dumps({"text": doc.text, "id": doc.id, "metadata": doc.metadata})
            assert isinstance(doc.text, str) and doc.id
            assert all(isinstance(doc.metadata[key], str) for key in ("source", "licence", "date", "path", "kind"))
        whole = sum(doc.text in sound and "fault" not in doc.metadata for doc in documents)
        passed_over = [label for label in reader.stats.stats if label.startswith(PASSED_OVER)]
        told = len(documents) > whole or passed_over
        assert whole >= len(sound) or told or form.excuses(content, documents), (
            f"seed {seed}: {whole} of {len(sound)} came out, and nothing is said"
        )
    extractor.__exit__()


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_mutated_file_gives_documents_or_faults_and_loses_nothing_in_silence(name, tmp_path):
    check_mutations(FORMATS[name], tmp_path, 100)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_ten_thousand_mutated_files_give_documents_or_faults(name, tmp_path):
    check_mutations(FORMATS[name], tmp_path, 10_000)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.datetimes() | st.decimals(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "id", "a", "b"]), inner),
    max_leaves=8,
)


def check_rows(row: object, fields: Fields) -> None:
    """A row of any shape, as `datasets` hands them on, is a document or a fault that can be written down."""
    doc = record_document(Origin("x", "", "MIT", "", ""), "0", "prose", row, fields)
    orjson.dumps({"text": doc.text, "id": doc.id, "metadata": doc.metadata})
    if "fault" not in doc.metadata:
        assert doc.text == fields.value(row, fields.text)


FIELDS = st.builds(
    Fields, *(st.sampled_from(keys) for keys in (["text", "a.b"], ["", "id"], ["", "a"], ["", "b"], ["", "a"]))
)


@given(VALUES, FIELDS)
@settings(max_examples=200, deadline=None)
def test_a_row_of_any_shape_is_a_document_or_a_fault(row, fields):
    check_rows(row, fields)


@pytest.mark.slow
@given(VALUES, FIELDS)
@settings(max_examples=10_000, deadline=None)
def test_ten_thousand_rows_of_any_shape_are_documents_or_faults(row, fields):
    check_rows(row, fields)


# Bad input of known sorts


def faults(documents: list) -> list[str]:
    return [doc.metadata.get("fault", "") for doc in documents]


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the peak memory of this process grows while it works."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_lines_of_100_mb_are_cut_in_bounded_memory(tmp_path):
    line = b'{"text": "' + b"x" * 100_000_000 + b'"}\n'
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.compress(RECORDS + line + RECORDS))
    del line
    found: list = []
    grown = peak_growth(lambda: found.extend(read(JsonLines([str(tmp_path)]), tmp_path)))
    assert faults(found) == [""] * 8 + ["long_line"] + [""] * 8
    assert found[8].metadata["detail"].startswith("100,000,012 bytes")
    assert grown < 12 * streams.LONGEST_LINE


def test_a_zstandard_bomb_unpacks_in_bounded_memory(tmp_path):
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.compress(bytes(3 * 10**8)))
    found: list = []
    grown = peak_growth(lambda: found.extend(read(JsonLines([str(tmp_path)]), tmp_path)))
    assert faults(found) == ["long_line"]
    assert grown < 12 * streams.LONGEST_LINE


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"[" * 100_000, "not_json"),
        (b'{"text": "a\xff"}', "not_json"),
        (b'{"text": "\\ud800"}', "not_json"),
        (b'{"text": "a\\u0000b", "id": 1}', "nul_bytes"),
        (b'{"text": ["a"]}', "no_text"),
        (b'["a", "b"]', "no_text"),
        (b'{"x": ' + b"[" * 500 + b"]" * 500 + b"}", "no_text"),
        (b"17", "no_text"),
        (b'{"text": "  ", "id": 1}', "empty"),
        (b'{"text": "a"}', "no_id"),
    ],
)
def test_records_of_the_wrong_shape_are_told_apart(tmp_path, line, fault):
    (tmp_path / "x.jsonl").write_bytes(RECORDS + line)
    documents = read(JsonLines([str(tmp_path)], fields=Fields(id="id")), tmp_path)
    assert faults(documents) == [""] * 8 + [fault]
    assert documents[-1].metadata["path"] == "x.jsonl:9"


@pytest.mark.parametrize("name", ["x.md", "x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.html", "x.warc", "x.warc.gz"])
def test_an_empty_file_is_counted(tmp_path, name):
    content = {"gz": gzip.compress(b""), "zst": zstandard.compress(b"")}.get(name.rsplit(".", 1)[1], b"")
    (tmp_path / name).write_bytes(content)
    source = next(f.source for f in FORMATS.values() if f.name == name or f.name.split(".")[1] == name.split(".")[1])
    assert faults(read(source(str(tmp_path)), tmp_path)) == ["empty"]


def test_a_table_without_the_column_is_counted_with_its_rows(tmp_path):
    (tmp_path / "x.parquet").write_bytes(parquet(TEXTS))
    documents = read(Parquet([str(tmp_path)], fields=Fields("content")), tmp_path)
    assert faults(documents) == ["damaged"] * 3
    assert documents[0].metadata["detail"] == "no column content; it has id, text; 3 rows of row group 0 are lost"


def test_what_a_record_says_of_itself_is_kept(tmp_path):
    record = {"body": {"text": TEXTS[0]}, "n": 7, "at": 1_700_000_000, "licence": ["MIT", "BSD"], "url": "http://a/b"}
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    fields = Fields("body.text", id="n", date="at", licence="licence", url="url")
    (doc,) = read(JsonLines([str(tmp_path)], fields=fields), tmp_path)
    assert (doc.text, doc.id) == (TEXTS[0], f"{tmp_path}#7")
    said = {key: doc.metadata[key] for key in ("date", "licence", "url", "source")}
    assert said == {"date": "2023-11-14T22:13:20Z", "licence": "MIT, BSD", "url": "http://a/b", "source": str(tmp_path)}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2024-05-06", "2024-05-06T00:00:00"),
        ("2024-05-06T07:08:09+02:00", "2024-05-06T05:08:09Z"),
        ("Mon, 06 May 2024 05:08:09 GMT", "2024-05-06T05:08:09Z"),
        (1_714_972_089, "2024-05-06T05:08:09Z"),
        (1_714_972_089_000, "2024-05-06T05:08:09Z"),
        (float("nan"), ""),
        (1e300, ""),
        ("yesterday", ""),
        (True, ""),
        (None, ""),
        ({}, ""),
    ],
)
def test_dates_become_iso_8601_or_nothing(value, expected):
    assert iso(value) == expected


def test_a_file_that_vanishes_or_changes_midway_stops_the_reading(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.md").write_text(TEXTS[0])
    (reader,) = Files([str(tmp_path)]).readers(tmp_path)
    documents = reader.run()
    next(documents)
    (tmp_path / "b.md").unlink()
    with pytest.raises(SourceError, match=r"b\.md was found, but cannot be read now \(No such file"):
        list(documents)
    (reader,) = Files([str(tmp_path)]).readers(tmp_path)
    (tmp_path / "a.md").write_text("Something else, written meanwhile.")
    with pytest.raises(SourceError, match="changed meanwhile"):
        list(reader.run())


def test_names_that_are_not_utf8_are_spelt_out(tmp_path):
    file = bytes(tmp_path) + b"/caf\xe9.md"
    with open(file, "wb") as stream:
        stream.write(TEXTS[0].encode())
    (doc,) = read(Files([str(tmp_path)]), tmp_path)
    assert doc.id == f"{tmp_path}/caf\\udce9.md" and orjson.dumps(doc.id)


def test_directories_that_are_not_utf8_are_spelt_out(tmp_path):
    directory = tmp_path / "caf\udce9"
    directory.mkdir()
    (directory / "a.py").write_text("print(1)\n")
    (directory / "picture.png").write_text("none")
    (directory / "x.warc").write_bytes(warc(TEXTS[:1], kind="conversion"))
    (directory / "y.warc").write_bytes(warc(TEXTS[:1], kind="metadata"))
    for source in (Repositories([str(directory)], licences=[], prose=[]), Warc([str(directory)])):
        (reader,) = source.readers(tmp_path)
        (doc,) = reader.run()
        passed = [label for label in reader.stats.stats if label.startswith(PASSED_OVER)]
        assert orjson.dumps([doc.id, doc.metadata, passed]) and passed


def test_links_out_of_a_directory_are_not_followed(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "secret.md").write_text("A secret.")
    (tmp_path / "notes/a.md").write_text(TEXTS[0])
    (tmp_path / "notes/link.md").symlink_to("../secret.md")
    assert [doc.text for doc in read(Files([str(tmp_path / "notes")]), tmp_path)] == [TEXTS[0]]


def test_members_that_climb_out_are_faults_and_nothing_is_unpacked(tmp_path):
    climbing = ["../../evil.md", "/etc/evil.md", "..\\evil.md", "C:\\evil.md"]
    (tmp_path / "x.zip").write_bytes(zipped(dict.fromkeys([*climbing, "good.md"], TEXTS[0])))
    documents = read(Files([str(tmp_path)]), tmp_path)
    assert faults(documents) == ["unsafe_path"] * 4 + [""]
    assert [file.name for file in tmp_path.iterdir()] == ["x.zip"]


def test_an_archive_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "LEAST_ALLOWED", 2**20)
    member = b"a" * (3 * 2**20)
    (tmp_path / "x.zip").write_bytes(
        zipped({"big.md": bytes(5 * 2**20), "a.md": member, "b.md": member, "c.md": member})
    )
    documents = read(Files([str(tmp_path)]), tmp_path)
    assert faults(documents) == ["too_large", "damaged"]
    assert documents[1].metadata["detail"] == "it unpacks to more than an archive of its size may"


# Pages


def answered(body: bytes, *headers: tuple[str, str]) -> bytes:
    """A WARC file of one page, whose body is stored as it was sent."""
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=False)
    head = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8"), *headers], protocol="HTTP/1.1")
    named = {"WARC-Record-ID": "<urn:uuid:1>"}
    payload = io.BytesIO(body)
    writer.write_record(
        writer.create_warc_record("http://a.org/", "response", payload, http_headers=head, warc_headers_dict=named)
    )
    return out.getvalue()


HALVES = page(TEXTS[0]).encode()[:150], page(TEXTS[0]).encode()[150:]
CHUNKS = [b"%x\r\n%s\r\n" % (len(half), half) for half in HALVES]


@pytest.mark.parametrize(
    ("encoding", "body", "sound"),
    [
        (("Transfer-Encoding", "chunked"), CHUNKS[0] + CHUNKS[1] + b"0\r\n\r\n", True),
        (("Transfer-Encoding", "chunked"), CHUNKS[0] + CHUNKS[1], False),
        (("Transfer-Encoding", "chunked"), CHUNKS[0] + CHUNKS[1][:-40], False),
        (("Transfer-Encoding", "chunked"), CHUNKS[0] + b"0\r\n\r\n" + CHUNKS[1] + b"0\r\n\r\n", False),
        (("Transfer-Encoding", "chunked"), CHUNKS[0] + b"!" + CHUNKS[1] + b"0\r\n\r\n", False),
        (("Content-Encoding", "gzip"), b"".join(map(gzip.compress, HALVES)), True),
        (("Content-Encoding", "gzip"), gzip.compress(HALVES[0]) + gzip.compress(HALVES[1])[:-9], False),
        (("Content-Encoding", "gzip"), gzip.compress(HALVES[0]) + HALVES[1], False),
        (("Content-Encoding", "deflate"), zlib.compress(b"".join(HALVES)), True),
        (("Content-Encoding", "deflate"), b"".join(map(zlib.compress, HALVES)), False),
    ],
)
def test_a_body_is_read_whole_or_is_damaged(tmp_path, encoding, body, sound):
    (tmp_path / "x.warc").write_bytes(answered(body, encoding))
    (doc,) = read(Warc([str(tmp_path)]), tmp_path)
    assert doc.metadata.get("fault") == (None if sound else "damaged")
    assert not sound or TEXTS[0] in doc.text


def test_endings_may_be_in_capitals(tmp_path):
    (tmp_path / "A.ZIP").write_bytes(zipped({"a.md": TEXTS[0]}))
    (tmp_path / "B.JSONL.GZ").write_bytes(gzip.compress(RECORDS))
    (tmp_path / "C.TAR.GZ").write_bytes(tarred(TEXTS[:1], "w:gz"))
    readers = Files([str(tmp_path)]).readers(tmp_path)
    documents = [doc for reader in readers for doc in reader.run()]
    assert sorted(doc.text for doc in documents) == sorted([TEXTS[0], TEXTS[0], *TEXTS])


def test_of_a_page_the_main_text_is_read_with_its_date_and_licence(tmp_path):
    head = '<meta property="article:published_time" content="2023-05-06T07:08:09Z">'
    foot = '<a rel="license" href="https://creativecommons.org/licenses/by/4.0/">CC BY</a>'
    html = page(TEXTS[3]).replace("<title>", f"{head}<title>").replace("</body>", f"{foot}</body>")
    (tmp_path / "x.html").write_text(html)
    (doc,) = read(Html([str(tmp_path)]), tmp_path)
    assert TEXTS[3] in doc.text and "Home" not in doc.text
    assert (doc.metadata["date"][:10], doc.metadata["licence"]) == ("2023-05-06", "CC BY 4.0")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("<html><body>" + "<div>" * 200_000 + TEXTS[0], "nested_too_deep"),
        ("<html><body>" + "<p>x</p>" * (2 * 2**20) + "</body></html>", "too_large"),
        ("<html><body></body></html>", "no_main_text"),
        ("\0\0\0", "nul_bytes"),
        (page("é").encode("latin-1"), "not_decodable"),
    ],
)
def test_pages_that_cannot_be_used_are_told_apart(tmp_path, content, fault):
    (tmp_path / "x.html").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert faults(read(Html([str(tmp_path)]), tmp_path)) == [fault]


@pytest.mark.parametrize("label", ["windows-1251", "shift_jis", "utf-16", "iso-8859-1"])
def test_pages_are_read_as_their_encoding_says(label):
    text = {"windows-1251": "Привет", "shift_jis": "こんにちは"}.get(label, "café")
    content = f'<meta http-equiv="Content-Type" content="text/html; charset={label}">{text}'.encode(label)
    assert text in (extraction.decoded_page(content, label if label == "utf-16" else "") or "")
    assert extraction.codec("punycode") is extraction.codec("zlib") is extraction.codec("no such") is None


def worker_with(directory: Path, beginning: str) -> str:
    """A copy of the extractor's program that begins with other lines."""
    worker = directory / "worker.py"
    worker.write_text(beginning + Path(extraction.extraction_worker.__file__).read_text())
    return str(worker)


STUCK = """
import trafilatura
extract = trafilatura.bare_extraction
def stuck(tree, **options):
    while "forever" in tree.text_content():
        pass
    bytes(8 * 2**30 if "memory" in tree.text_content() else 0)
    return extract(tree, **options)
trafilatura.bare_extraction = stuck
"""


def test_a_page_that_takes_too_long_or_too_much_is_a_fault_and_the_next_is_read(tmp_path, monkeypatch):
    for name, text in {"a": TEXTS[0], "b": "forever", "c": TEXTS[1], "d": "memory", "e": TEXTS[2]}.items():
        (tmp_path / f"{name}.html").write_text(page(text))
    monkeypatch.setattr(extraction, "SECONDS", 1)
    monkeypatch.setattr(extraction.extraction_worker, "__file__", worker_with(tmp_path, STUCK))
    documents = read(Html([str(tmp_path)]), tmp_path)
    assert faults(documents) == ["", "extraction_time", "", "extraction_memory", ""]


def test_an_extractor_that_does_not_work_stops_the_build_before_the_first_page(tmp_path, monkeypatch):
    """datatrove's counts every page as one that took too long, and reports success."""
    (tmp_path / "x.html").write_text(page(TEXTS[0]))
    missing = worker_with(tmp_path, "import sys\nsys.modules['lxml_html_clean'] = None\nimport lxml_html_clean\n")
    monkeypatch.setattr(extraction.extraction_worker, "__file__", missing)
    with pytest.raises(SourceError, match=r"(?s)cannot be extracted.*lxml_html_clean"):
        read(Html([str(tmp_path)]), tmp_path)
