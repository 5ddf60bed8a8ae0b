"""The collector against a real server on this machine: polite, bounded, resumable, and nothing fetched twice."""

import gzip
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
from warcio.archiveiterator import ArchiveIterator

from conf.errors import ConfigError
from data_pipeline.artifact import Artifact
from data_pipeline.collector import addresses
from data_pipeline.collector.addresses import among, normal, public
from data_pipeline.collector.fetching import Answer, fetch
from data_pipeline.collector.robots import Rules
from data_pipeline.collector.rounds import Round
from data_pipeline.collector.store import Store, StoreError
from data_pipeline.config import PipelineConfig
from data_pipeline.corpus.collect import Collect
from data_pipeline.sources.warc import Warc

TEXT = "This paragraph says something about {}, at such length that it is taken for the main text of the page."
MODIFIED = "Mon, 06 May 2024 05:08:09 GMT"


def html(name: str, *links: str, head: str = "") -> bytes:
    anchors = "".join(f'<a href="{link}">link</a>' for link in links)
    text = TEXT.format(name)
    return (
        f"<html><head>{head}</head><body><article><p>{text}</p><p>{text}</p></article>{anchors}</body></html>".encode()
    )


@dataclass
class Site:
    """A server of pages and what it was asked for.

    Args:
        pages: path -> what answers: (status, headers, body), or a function of the request's headers that says so.
    """

    pages: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    url: str = ""

    @property
    def paths(self) -> list[str]:
        return [path for _, path, _ in self.asked]


def ok(body: bytes, **headers: str) -> tuple:
    return (
        200,
        {"Content-Type": "text/html; charset=utf-8", **{k.replace("_", "-"): v for k, v in headers.items()}},
        body,
    )


@contextmanager
def served(host: str = "127.0.0.1") -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            site.asked.append((time.monotonic(), self.path, dict(self.headers)))
            answer = site.pages.get(self.path, (404, {}, b"no such page"))
            status, headers, body = answer(self.headers) if callable(answer) else answer
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = "Content-Length" in headers

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer((host, 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site.url = f"http://{host}:{server.server_address[1]}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def site():
    with served() as found:
        yield found


def collect(site: Site, **changes) -> Collect:
    settings = {"seeds": [f"{site.url}/"], "contact": "me@example.org", "delay_s": 0.0, "backoff_s": 0.01}
    return Collect(**(settings | {"private": True, "revisit_h": 0.0, "timeout_s": 5.0} | changes))


def round_of(settings: Collect, directory: Path) -> dict:
    directory.mkdir(exist_ok=True)
    rounds = sorted((directory / "raw").glob("*"))
    while rounds and rounds[-1].name == time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime()):
        time.sleep(0.05)  # a round is named by the second
    return Round(settings, directory).run()


def records(directory: Path) -> list[tuple[str, str]]:
    """(type, path) of every record that is stored, rounds in order."""
    found = []
    for file in sorted(directory.glob("raw/*/*.warc.gz")):
        with open(file, "rb") as stream:
            for record in ArchiveIterator(stream, check_digests="raise"):
                record.content_stream().read()
                uri = record.rec_headers.get_header("WARC-Target-URI") or ""
                found.append((record.rec_type, "/" + uri.split("/", 3)[-1]))
    return [entry for entry in found if entry[0] != "warcinfo"]


def test_what_is_linked_is_stored_and_read_as_documents(site, tmp_path):
    elsewhere = "http://elsewhere.example/"
    site.pages["/"] = ok(html("the beginning", "/a", "b?q=1#part", elsewhere, "mailto:x@y", "/gone", "/moved"))
    site.pages["/a"] = ok(gzip.compress(html("a thing")), Content_Encoding="gzip")
    site.pages["/b?q=1"] = ok(html("b", "/"))
    site.pages["/moved"] = (301, {"Location": "/target"}, b"")
    site.pages["/target"] = ok(html("the target"))
    result = round_of(collect(site), tmp_path / "crawl")
    assert Counter(site.paths) == Counter(["/robots.txt", "/", "/a", "/b?q=1", "/gone", "/moved", "/target"])
    assert result["pages"] == {"done": 4, "gone": 1, "moved": 1}
    assert all("longrun (+me@example.org)" in headers["User-Agent"] for _, _, headers in site.asked)
    (reader,) = Warc([str(tmp_path / "crawl/raw")], licence="CC0-1.0").readers(tmp_path)
    documents = {doc.metadata["url"].removeprefix(site.url): doc for doc in reader.run()}
    assert set(documents) == {"/", "/a", "/b?q=1", "/target"}
    assert TEXT.format("a thing") in documents["/a"].text
    assert documents["/a"].metadata["date"].endswith("Z") and documents["/a"].metadata["licence"] == "CC0-1.0"


def test_robots_txt_is_obeyed_with_its_delay(site, tmp_path):
    rules = b"User-agent: *\nDisallow: /private/*.html$\nCrawl-delay: 0.2\n\nUser-agent: other\nDisallow: /"
    site.pages["/robots.txt"] = (200, {"Content-Type": "text/plain"}, rules)
    site.pages["/"] = ok(html("the beginning", "/private/a.html", "/private/a.txt"))
    site.pages["/private/a.txt"] = ok(html("what is allowed"))
    result = round_of(collect(site), tmp_path / "crawl")
    assert site.paths == ["/robots.txt", "/", "/private/a.txt"]
    times = [at for at, _, _ in site.asked]
    assert all(later - earlier > 0.19 for earlier, later in pairwise(times))
    assert result["pages"] == {"done": 2, "refused": 1}


def test_a_host_whose_robots_txt_fails_is_not_asked_for_a_page(site, tmp_path):
    site.pages["/robots.txt"] = (503, {}, b"")
    site.pages["/"] = ok(html("the beginning"))
    result = round_of(collect(site, retries=2), tmp_path / "crawl")
    assert site.paths == ["/robots.txt"] * 3
    assert result["pages"] == {"failed": 1}


def test_a_packed_robots_txt_is_obeyed_and_a_damaged_one_allows_nothing(site, tmp_path):
    packed = gzip.compress(b"User-agent: *\nDisallow: /a")
    site.pages["/robots.txt"] = (200, {"Content-Encoding": "gzip"}, packed)
    site.pages["/"] = ok(html("the beginning", "/a"))
    assert round_of(collect(site), tmp_path / "crawl")["pages"] == {"done": 1, "refused": 1}
    site.pages["/robots.txt"] = (200, {"Content-Encoding": "gzip"}, packed[:-12])
    assert round_of(collect(site, retries=0), tmp_path / "damaged")["pages"] == {"failed": 1}
    assert site.paths == ["/robots.txt", "/", "/robots.txt"]


def test_a_robots_txt_that_was_moved_is_asked_for_at_the_rate_of_each_host(tmp_path):
    with served() as one, served("127.0.0.2") as other:
        one.pages["/robots.txt"] = (301, {"Location": "/moved"}, b"")
        one.pages["/moved"] = (301, {"Location": f"{other.url}/robots.txt"}, b"")
        other.pages["/robots.txt"] = (200, {}, b"User-agent: *\nDisallow: /a")
        one.pages["/"] = other.pages["/"] = ok(html("the beginning", "/a"))
        settings = collect(one, seeds=[f"{one.url}/", f"{other.url}/"], delay_s=0.2)
        assert round_of(settings, tmp_path / "crawl")["pages"] == {"done": 2, "refused": 2}
        assert one.paths == ["/robots.txt", "/moved", "/"]
        assert Counter(other.paths) == {"/robots.txt": 2, "/": 1}
        for site in (one, other):
            assert all(later[0] - earlier[0] > 0.19 for earlier, later in pairwise(site.asked))


def test_a_robots_txt_that_is_moved_without_end_allows_nothing(site, tmp_path):
    site.pages["/robots.txt"] = (301, {"Location": "/robots.txt"}, b"")
    assert round_of(collect(site, retries=0), tmp_path / "crawl")["pages"] == {"failed": 1}
    assert site.paths == ["/robots.txt"] * 6


@pytest.mark.parametrize("asked", ["Crawl-delay: 99999999999", f"Request-rate: 1/{'9' * 400}"])
def test_a_host_that_asks_for_too_long_a_delay_is_given_up(site, tmp_path, asked):
    site.pages["/robots.txt"] = (200, {}, f"User-agent: *\n{asked}".encode())
    assert round_of(collect(site), tmp_path / "crawl")["pages"] == {"refused": 1}
    assert site.paths == ["/robots.txt"]


@pytest.mark.parametrize(
    ("first", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    ],
)
def test_a_server_that_drips_is_hung_up_on(first, drop):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            line, _ = server.accept()
            with line, suppress(OSError):
                line.sendall(first)
                while True:
                    line.sendall(drop)
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        begin = time.monotonic()
        answer = fetch(addresses.pool(True, 1), url, {}, 10**6, timeout_s=1)
        assert time.monotonic() - begin < 1.5
    assert answer.fault == "not done within 1 s" and answer.passing


def test_what_is_received_in_vain_counts_among_the_bytes(site, tmp_path):
    site.pages["/robots.txt"] = (404, {}, b"x" * 100)
    site.pages["/"] = (200, {"Content-Length": "99999"}, b"x" * 1000)
    result = round_of(collect(site, retries=1), tmp_path / "crawl")
    assert result["pages"] == {"failed": 1}
    assert result["rounds"][0]["bytes"] == 100 + 2 * 1000


def test_one_host_waits_while_others_are_asked(tmp_path):
    with served() as slow, served("127.0.0.2") as quick:
        for one in (slow, quick):
            one.pages["/"] = ok(html("the beginning", "/a", "/b"))
            one.pages["/a"] = one.pages["/b"] = ok(html("more"))
        slow.pages["/robots.txt"] = (200, {}, b"User-agent: *\nCrawl-delay: 0.3")
        round_of(collect(slow, seeds=[f"{slow.url}/", f"{quick.url}/"]), tmp_path / "crawl")
        assert len(slow.asked) == len(quick.asked) == 4
        assert quick.asked[-1][0] < slow.asked[-1][0]


def test_a_failing_page_is_tried_again_later_and_later_then_given_up(site, tmp_path):
    answers = iter([(503, {"Retry-After": "1"}, b""), (500, {}, b""), ok(html("what came at last"))])
    site.pages["/"] = lambda headers: next(answers)
    site.pages["/robots.txt"] = (404, {}, b"")
    result = round_of(collect(site), tmp_path / "crawl")
    times = [at for at, path, _ in site.asked if path == "/"]
    assert len(times) == 3 and times[1] - times[0] > 0.95
    assert result["pages"] == {"done": 1}
    site.pages["/"] = (500, {}, b"")
    assert round_of(collect(site, retries=1), tmp_path / "crawl")["pages"] == {"failed": 1}
    assert len(site.asked) == 6  # robots.txt is known for a day


def conditional(version: str, modified: str = ""):
    """A page that answers 304 to whom it gave this version."""

    def answer(headers) -> tuple:
        known = headers["If-Modified-Since"] == modified if modified else headers["If-None-Match"] == version
        validators = {"Last-Modified": modified} if modified else {"ETag": version}
        return (304, validators, b"") if known else ok(html(f"version {version}"), **validators)

    return answer


def test_a_second_round_asks_only_for_what_changed(site, tmp_path):
    site.pages["/"] = ok(html("the beginning", "/tagged", "/dated"))
    site.pages["/tagged"] = conditional('"1"')
    site.pages["/dated"] = conditional("x", MODIFIED)
    round_of(collect(site), tmp_path / "crawl")
    round_of(collect(site), tmp_path / "crawl")
    site.pages["/tagged"] = conditional('"2"')
    result = round_of(collect(site), tmp_path / "crawl")
    first = [("response", "/"), ("response", "/tagged"), ("response", "/dated")]
    second = [("revisit", "/"), ("revisit", "/tagged"), ("revisit", "/dated")]
    assert records(tmp_path / "crawl") == [*first, *second, second[0], ("response", "/tagged"), second[2]]
    assert [(one["stored"], one["unchanged"]) for one in result["rounds"]] == [(3, 0), (0, 3), (1, 2)]
    (reader,) = Warc([str(tmp_path / "crawl/raw")]).readers(tmp_path)
    assert len(list(reader.run())) == 4  # each version once


def test_pages_are_left_alone_until_it_is_time(site, tmp_path):
    site.pages["/"] = ok(html("the beginning"))
    round_of(collect(site), tmp_path / "crawl")
    round_of(collect(site, revisit_h=1.0), tmp_path / "crawl")
    assert site.paths == ["/robots.txt", "/"]


def test_depth_number_and_size_are_bounded(site, tmp_path):
    for number in range(50):
        site.pages[f"/{number or ''}"] = ok(html(f"number {number}", f"/{number + 1}"))
    assert round_of(collect(site, depth=2), tmp_path / "deep")["pages"] == {"done": 3}
    assert round_of(collect(site, depth=99, pages=5), tmp_path / "many")["pages"] == {"done": 5, "due": 1}
    assert round_of(collect(site, depth=99, pages=5), tmp_path / "many")["pages"]["done"] >= 5
    site.pages["/"] = ok(html("a bomb") + b"x" * 10**6)
    assert round_of(collect(site, page_bytes=10**5), tmp_path / "large")["pages"] == {"failed": 1}


def test_answers_that_break_off_or_never_end_are_failures(site, tmp_path):
    site.pages["/"] = ok(html("the beginning", "/short"))
    site.pages["/short"] = (200, {"Content-Type": "text/html", "Content-Length": "99999"}, html("half"))
    site.pages["/slow"] = lambda headers: (time.sleep(2), ok(html("late")))[1]
    result = round_of(
        collect(site, retries=0, timeout_s=0.5, seeds=[f"{site.url}/", f"{site.url}/slow"]), tmp_path / "crawl"
    )
    assert result["pages"] == {"done": 1, "failed": 2}


def test_what_a_page_asks_of_collectors_is_done(site, tmp_path):
    site.pages["/"] = ok(html("the beginning", "/noindex", "/nofollow", "/header"))
    site.pages["/noindex"] = ok(html("secrets", "/a", head='<meta name="Robots" content="NOINDEX">'))
    site.pages["/nofollow"] = ok(html("a list", "/b", head='<meta name="robots" content="nofollow">'))
    site.pages["/header"] = ok(html("no", "/c"), X_Robots_Tag="none")
    result = round_of(collect(site), tmp_path / "crawl")
    assert result["pages"] == {"done": 2, "refused": 2}
    assert records(tmp_path / "crawl") == [("response", "/"), ("response", "/nofollow")]


def test_each_word_of_x_robots_tag_counts_for_all_sorts_of_content(site, tmp_path):
    site.pages["/"] = ok(html("the beginning", "/paper", "/meta", "/named"), X_Robots_Tag="max-image-preview: none")
    site.pages["/paper"] = (200, {"Content-Type": "application/pdf", "X-Robots-Tag": "noindex"}, b"%PDF")
    site.pages["/meta"] = ok(html("no", head='<meta name="Longrun" content="noindex">'))
    site.pages["/named"] = ok(html("no"), X_Robots_Tag="noarchive", x_robots_tag="Longrun: noindex")
    assert round_of(collect(site), tmp_path / "crawl")["pages"] == {"done": 1, "refused": 3}
    assert len(site.asked) == 5


def test_private_machines_are_not_asked_unless_allowed(site, tmp_path):
    site.pages["/"] = ok(html("what is inside"))
    port = site.url.rsplit(":", 1)[1]
    seeds = [f"{site.url}/", f"http://localhost:{port}/"]
    assert round_of(collect(site, seeds=seeds, private=False), tmp_path / "crawl")["pages"] == {"failed": 2}
    assert site.asked == []


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("::1", False),
        ("::ffff:10.0.0.1", False),
        ("fe80::1%eth0", False),
        ("224.0.0.1", False),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
        ("2002:7f00:1::", False),
        ("::127.0.0.1", False),
    ],
)
def test_addresses_of_the_public_internet_are_told(address, expected):
    assert public(address) == expected


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("../c?x=1#y", "http://a.example/c?x=1"),
        ("HTTP://A.Example:80", "http://a.example/"),
        ("//b.example:8080/é", "http://b.example:8080/%C3%A9"),
        ("https://user:secret@a.example/", None),
        ("javascript:alert(1)", None),
        ("file:///etc/passwd", None),
        ("http://[::1", None),
        ("http://a.example:99999/", None),
        ("/" + "x" * 3000, None),
    ],
)
def test_an_address_has_one_spelling(link, expected):
    assert normal(link, "http://a.example/b/") == expected


def test_hosts_are_shell_patterns():
    assert among("http://docs.example.org:8080/", ["*.example.org"])
    assert not among("http://example.org.evil.net/", ["example.org", "*.example.org"])


def test_rules_that_cannot_be_had_allow_nothing_and_missing_ones_all():
    for status, allowed in ((404, True), (401, True), (429, False), (500, False)):
        assert Rules.of(Answer("http://x/robots.txt", status), "longrun").allow("http://x/a") is allowed
    assert not Rules.of(Answer("http://x/robots.txt", fault="no connection"), "longrun").allow("http://x/a")


def killed(settings: Collect, directory: Path, call: int) -> None:
    """A round in a process that gets SIGKILL after it stored so many pages, before it notes down the last."""
    from data_pipeline.collector.store import Store

    append, calls = Store.append, Counter()

    def lethal(self, *arguments):
        place = append(self, *arguments)
        calls["n"] += 1
        if calls["n"] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return place

    def work():
        Store.append = lethal
        Round(settings, directory).run()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_round_is_gone_on_with_and_stores_each_page_once(site, tmp_path):
    names = [f"/{number}" for number in range(6)]
    site.pages["/"] = ok(html("the beginning", *names))
    for name in names:
        site.pages[name] = ok(html(f"page {name}"))
    (tmp_path / "crawl").mkdir()
    killed(collect(site), tmp_path / "crawl", call=1)
    killed(collect(site), tmp_path / "crawl", call=3)
    result = round_of(collect(site), tmp_path / "crawl")
    assert result["pages"] == {"done": 7} and len(result["rounds"]) == 1
    assert records(tmp_path / "crawl") == [("response", name) for name in ["/", *names]]


def test_a_file_that_lost_its_end_is_not_gone_on_with(site, tmp_path):
    store = Store(tmp_path, "longrun")
    _, size = store.append(Answer(f"{site.url}/", 200, body=b"x"), 0.0, (0, 0))
    store.resume(0, size)
    with pytest.raises(StoreError, match="put it back"):
        store.resume(0, size + 1)
    assert (tmp_path / "00000.warc.gz").stat().st_size == size


def test_what_is_stored_is_on_the_disk(site, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    _, size = Store(tmp_path, "longrun").append(Answer(f"{site.url}/", 200, body=b"x"), 0.0, (0, 0))
    assert synced == [size]


def test_two_rounds_within_a_second_are_refused(site, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    first = Round(collect(site), tmp_path)
    first.frontier.note_round(first.name, ended=1e9)
    first.frontier.close()
    with pytest.raises(StoreError, match="run it again"):
        Round(collect(site), tmp_path)


def test_hosts_of_seeds_are_known_in_their_one_spelling(tmp_path):
    seeds = ["HTTPS://A.Example:443/x", "http://b\u00fccher.example/"]
    assert Round(Collect(seeds=seeds), tmp_path).hosts == ["a.example", "xn--bcher-kva.example"]


def test_the_store_is_an_artifact_that_names_what_it_holds(site, tmp_path, capsys):
    site.pages["/"] = ok(html("the beginning"))
    settings = collect(site)
    assert settings.run(PipelineConfig(corpus=settings, run_dir=str(tmp_path / "crawl")), {}) == 0
    assert "asked for 1 pages, stored 1, 0 were unchanged" in capsys.readouterr().out
    artifact = Artifact.read(tmp_path / "crawl", "crawl")
    artifact.verify()
    assert artifact.metrics["pages"] == {"done": 1} and len(artifact.files) == 1


def test_a_collector_that_cannot_be_reached_by_operators_is_refused():
    with pytest.raises(ConfigError, match=r"corpus\.contact(.|\n)*corpus\.delay_s"):
        raise ConfigError(Collect(seeds=["http://a.example/"], delay_s=-1).problems(PipelineConfig(corpus=None), 1))


def test_a_seed_that_would_not_be_asked_for_is_refused():
    seeds = ["http://a.example/", "https://me:secret@a.example/", "http://"]
    problems = Collect(seeds=seeds, contact="me@example.org").problems(PipelineConfig(corpus=None), 1)
    assert [problem.found for problem in problems] == seeds[1:]


def test_what_the_guard_checks_is_what_it_connects_to(monkeypatch):
    """A name that is looked up a second time may lead elsewhere."""
    lookups = iter([[(2, 1, 6, "", ("10.0.0.1", 80))]])
    monkeypatch.setattr(addresses.socket, "getaddrinfo", lambda *a, **k: next(lookups))
    with pytest.raises(addresses.PrivateAddressError, match=r"10\.0\.0\.1"):
        addresses.pool(False, 1).request("GET", "http://rebound.example/", retries=False)
