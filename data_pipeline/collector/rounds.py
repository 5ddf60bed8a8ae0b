"""A round of collecting: every page that is due is asked for once, each host no faster than it likes.

One thread decides and writes; others only wait for servers, one per host at a time.
"""

import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from data_pipeline.collector.addresses import among, host_of, normal, pool
from data_pipeline.collector.fetching import Answer, fetch
from data_pipeline.collector.frontier import Frontier, Known
from data_pipeline.collector.robots import REDIRECTS, ROBOTS_LIFE_S, Page, Rules, page
from data_pipeline.collector.store import Store, StoreError, Version, digest_of, written_date
from data_pipeline.readers.extraction import decoded_page
from data_pipeline.readers.streams import DamageError
from data_pipeline.readers.warc import CHARSET, HTML, unpacked_body

if TYPE_CHECKING:
    from data_pipeline.corpus.collect import Collect

LONGEST_WAIT_S = 3600.0
"""That a server may ask for; after it the page is tried again."""


@dataclass(frozen=True)
class Job:
    """What a thread asks for.

    Args:
        host: that is asked.
        page: of the host; None for its robots.txt.
        url: address that is asked for; of a robots.txt that was moved, maybe at another host.
    """

    host: str
    page: Known | None
    url: str

    @property
    def hosts(self) -> set[str]:
        """Those that nobody else may ask meanwhile."""
        return {self.host, host_of(self.url)}


class Round:
    """Collects into `raw/<date>/`, or goes on with a round that was cut.

    Args:
        settings: what is collected, and how politely.
        directory: holds `visits.sqlite` and `raw`.
    """

    def __init__(self, settings: "Collect", directory: Path):
        self.settings = settings
        self.frontier = Frontier(directory / "visits.sqlite")
        now = time.time()
        found = self.frontier.round()
        if found is None:
            name = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H%M%SZ")
            with self.frontier.together():
                self.frontier.begin(name, now - settings.revisit_h * 3600)
                found = self.frontier.round()
                if found is None:
                    raise StoreError(f"{directory}: a round began within this second; run it again")
        self.name = found.pop("name")
        del found["ended"]
        self.facts: dict[str, int] = found
        self.store = Store(directory / "raw" / self.name, settings.agent)
        self.store.resume(self.facts["file"], self.facts["size"])
        seeds = [url for seed in settings.seeds if (url := normal(seed))]
        self.moved: dict[str, list[str]] = {}  # host -> addresses that its robots.txt was moved to
        self.hosts = settings.hosts or sorted({urlsplit(url).netloc for url in seeds})
        with self.frontier.together():
            for url in seeds:
                self.frontier.add(url, 0)

    def run(self) -> dict[str, Any]:
        """Until nothing is due, or a bound is reached; returns what became of pages and rounds."""
        settings = self.settings
        busy: dict[Future[Answer], Job] = {}
        self.pool = pool(settings.private, settings.connections)
        with ThreadPoolExecutor(settings.connections) as threads:
            while True:
                wake = self._start(threads, busy)
                if not busy and wake is None:
                    break
                timeout = None if wake is None else min(LONGEST_WAIT_S, max(0.0, wake - time.time()))
                if not busy:
                    time.sleep(timeout or 0.0)
                    continue
                for future in wait(busy, timeout, FIRST_COMPLETED).done:
                    self._take(busy.pop(future), future.result())
        with self.frontier.together():
            self.frontier.note_round(self.name, ended=time.time())
        result = {"pages": self.frontier.states(), "rounds": self.frontier.rounds()}
        self.frontier.close()
        return result

    def _start(self, threads: ThreadPoolExecutor, busy: "dict[Future[Answer], Job]") -> float | None:
        """Hand out work for hosts that are at leisure; returns when to look again, None if there is nothing more."""
        now, wake = time.time(), None
        asked = {host for job in busy.values() for host in job.hosts}
        waiting = sum(job.page is not None for job in busy.values())
        for host in self.frontier.hosts():
            room = self.facts["asked"] + waiting < self.settings.pages and self.facts["bytes"] < self.settings.bytes
            if not room:
                return None
            if host["host"] in asked:
                continue
            if host["ready"] > now:
                wake = host["ready"] if wake is None else min(wake, host["ready"])
                continue
            if len(busy) >= self.settings.connections:
                break
            job = self._job(host, now)
            if job is None:
                return now  # pages were refused: look at once at what is left
            if job.hosts & asked:
                continue
            if (ready := self._ready(host_of(job.url))) > now:
                wake = ready if wake is None else min(wake, ready)
                continue
            asked |= job.hosts
            waiting += job.page is not None
            busy[threads.submit(self._ask, job)] = job
        return wake

    def _job(self, host: dict[str, Any], now: float) -> Job | None:
        name = host["host"]
        if now - host["asked"] > ROBOTS_LIFE_S:
            return Job(name, None, self.moved.get(name, [f"{name}/robots.txt"])[-1])
        rules = Rules(host["robots"], self.settings.agent)
        if rules.delay_s > LONGEST_WAIT_S:
            self.frontier.give_up(name, "refused", f"robots.txt asks for {rules.delay_s:,.0f} s between two requests")
            return None
        while (found := self.frontier.next(name, now)) is not None:
            if rules.allow(found.url):
                return Job(name, found, found.url)
            self.frontier.note(found.url, state="refused", detail="robots.txt", asked=now)
        return None

    def _ready(self, host: str) -> float:
        """When a host may be asked next."""
        return float(self.frontier.host(host)["not_before"])

    def _ask(self, job: Job) -> Answer:
        settings = self.settings
        headers = {"User-Agent": f"{settings.agent} (+{settings.contact})"}
        if job.page and job.page.digest:
            validators = {"If-None-Match": job.page.etag, "If-Modified-Since": job.page.modified}
            headers |= {name: value for name, value in validators.items() if value}
        return fetch(self.pool, job.url, headers, settings.page_bytes, settings.timeout_s)

    def _take(self, job: Job, answer: Answer) -> None:
        with self.frontier.together():
            self.facts["bytes"] += answer.received
            if job.page is None:
                self._take_robots(job, answer)
            else:
                self._take_page(job.page, answer)
            self.frontier.note_round(self.name, **self.facts)

    def _take_robots(self, job: Job, answer: Answer) -> None:
        host, now, rules = job.host, time.time(), Rules.of(answer, self.settings.agent)
        known = Rules(self.frontier.host(host_of(job.url))["robots"], self.settings.agent)
        self.frontier.note_host(host_of(job.url), not_before=now + self._delay(known))
        target = normal(answer.header("location"), job.url) if 300 <= answer.status < 400 else None
        trail = self.moved.pop(host, [])
        if target and among(target, self.hosts) and len(trail) < REDIRECTS:
            self.frontier.note_unseen(host_of(target))
            self.moved[host] = [*trail, target]
            return
        if rules.text is not None:
            self.frontier.note_host(host, robots=rules.text, asked=now, tries=0, not_before=now + self._delay(rules))
            return
        tries = self.frontier.host(host)["tries"] + 1
        status = "it cannot be unpacked" if answer.status == 200 else f"status {answer.status}"
        why = f"robots.txt cannot be had: {answer.fault or status}"
        if tries > self.settings.retries or answer.lasting:
            self.frontier.give_up(host, "failed", why)
        self.frontier.note_host(host, tries=tries, not_before=now + self._backoff(tries, answer, now))

    def _take_page(self, known: Known, answer: Answer) -> None:
        now = time.time()
        rules = Rules(self.frontier.host(known.host)["robots"], self.settings.agent)
        self.facts["asked"] += 1
        next_s = now + self._delay(rules)
        if answer.passing and known.tries < self.settings.retries:
            later = now + self._backoff(known.tries + 1, answer, now)
            self.frontier.note(known.url, tries=known.tries + 1, not_before=later)
            next_s = max(next_s, later) if answer.status in (429, 503) else next_s
        else:
            self.frontier.note(known.url, asked=now, **self._settled(known, answer, now))
        self.frontier.note_host(known.host, not_before=next_s)

    def _settled(self, known: Known, answer: Answer, now: float) -> dict[str, Any]:
        """What becomes of a page that was answered, or will not be; stores it and adds its links."""
        if answer.fault:
            return {"state": "failed", "detail": answer.fault}
        if answer.status == 304 and known.digest:
            self._keep(answer, now, Version(known.digest, known.stored))
            return {"state": "done", "detail": "304"}
        if 300 <= answer.status < 400:
            self._add([answer.header("location")], known.url, known.depth + 1)
            return {"state": "moved", "detail": answer.header("location")[:500]}
        if answer.status != 200:
            return {"state": "gone" if answer.status in (404, 410) else "failed", "detail": f"status {answer.status}"}
        said = self._said(answer)
        if not said.kept:
            return {"state": "refused", "detail": "noindex"}
        digest = digest_of(answer.body)
        same = Version(known.digest, known.stored) if digest == known.digest else None
        self._keep(answer, now, same)
        if said.followed:
            self._add(said.links, normal(said.base, known.url) or known.url, known.depth + 1)
        validators = {"etag": answer.header("etag")[:500], "modified": answer.header("last-modified")[:100]}
        stored = known.stored if same else written_date(now)
        return {"state": "done", "detail": "200", "digest": digest, "stored": stored, **validators}

    def _said(self, answer: Answer) -> Page:
        """What a page says to collectors; in its headers alone, if it is not HTML or damaged."""
        media, text = answer.header("content-type"), None
        charset = CHARSET.search(media)
        if media.split(";")[0].strip().lower() in HTML:
            with suppress(DamageError):
                content = unpacked_body(answer.body, answer.header("content-encoding"))
                text = decoded_page(content, charset[1] if charset else "")
        return page(text or "", answer.url, answer.all("x-robots-tag"), self.settings.agent)

    def _keep(self, answer: Answer, now: float, same: Version | None) -> None:
        place = self.store.append(answer, now, (self.facts["file"], self.facts["size"]), same)
        self.facts["file"], self.facts["size"] = place
        self.facts["unchanged" if same else "stored"] += 1

    def _add(self, links: list[str], base: str, depth: int) -> None:
        if depth > self.settings.depth:
            return
        for link in links:
            url = normal(link, base)
            if url and among(url, self.hosts):
                self.frontier.add(url, depth)

    def _delay(self, rules: Rules) -> float:
        """Seconds until a host may be asked again; one that asks for too much will not be."""
        asked = rules.delay_s
        return max(self.settings.delay_s, asked if asked <= LONGEST_WAIT_S else 0.0)

    def _backoff(self, tries: int, answer: Answer, now: float) -> float:
        """Seconds until the next try: twice as long each time, and no sooner than the server asks for."""
        return min(LONGEST_WAIT_S, max(self.settings.backoff_s * 2 ** (tries - 1), answer.retry_after(now)))
