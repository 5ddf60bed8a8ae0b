"""corpus=collect: web pages, collected round by round into a raw store that the source `warc` reads."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import Problem
from conf.registry import register
from data_pipeline.artifact import MANIFEST, Draft, check_kind, locked
from data_pipeline.config import DataSet, PipelineConfig

KIND = "crawl"


@register("corpus", "collect")
@dataclass(frozen=True)
class Collect(DataSet):
    """Collect pages of a few hosts. Each run is a round, which asks again for what was last asked for `revisit_h` ago;
    one that was killed is gone on with. What servers send is kept in `raw/<date of the round>/` as WARC.

    Args:
        seeds: addresses to begin with.
        hosts: where pages may be, as shell patterns of host names, such as docs.example.org or *.example.org; if none
            are given, those of the seeds.
        contact: page or e-mail address that operators of servers find in their logs.
        agent: name that robots.txt files know this collector by.
        depth: most links from a seed to a page.
        pages: most requests for pages in a round.
        bytes: most bytes that a round receives.
        page_bytes: most bytes of one answer.
        delay_s: least seconds between two requests to a host; its robots.txt may ask for more.
        connections: most hosts that are asked at the same time.
        timeout_s: seconds that one answer may take.
        retries: how often a page is asked for again in a round, if the server or the connection fails.
        backoff_s: seconds before the first of these; each waits twice as long, or as long as the server asks for.
        revisit_h: hours after which a page is asked for again, if it has changed.
        private: also ask machines that are not on the public internet.
    """

    seeds: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    contact: str = ""
    agent: str = "longrun"
    depth: int = 3
    pages: int = 10_000
    bytes: int = 10_000_000_000
    page_bytes: int = 16_000_000
    delay_s: float = 1.0
    connections: int = 8
    timeout_s: float = 60.0
    retries: int = 3
    backoff_s: float = 5.0
    revisit_h: float = 24.0
    private: bool = False

    def problems(self, config: PipelineConfig, world_size: int) -> list[Problem]:
        from data_pipeline.collector.addresses import normal

        found = []
        if not self.seeds:
            found.append(Problem("corpus.seeds", "[]", "addresses to begin with, as [https://docs.example.org/]"))
        for seed in self.seeds:
            if normal(seed) is None:
                found.append(
                    Problem("corpus.seeds", seed, "an address that begins with https:// or http://, without a password")
                )
        if not self.contact:
            found.append(
                Problem("corpus.contact", "''", "a page or e-mail address where those who run servers reach you")
            )
        least = {"pages": 1, "bytes": 1, "page_bytes": 1, "connections": 1, "depth": 0, "retries": 0, "revisit_h": 0}
        for key, value in {**least, "delay_s": 0, "backoff_s": 0}.items():
            if getattr(self, key) < value:
                found.append(Problem(f"corpus.{key}", getattr(self, key), f"at least {value}"))
        if self.timeout_s <= 0:
            found.append(Problem("corpus.timeout_s", self.timeout_s, "more than 0 seconds"))
        return found

    def run(self, config: PipelineConfig, resolved: dict[str, Any]) -> int:
        from data_pipeline.collector.rounds import Round

        directory = Path(config.run_dir)
        with locked(directory):
            check_kind(directory, KIND)
            (directory / MANIFEST).unlink(missing_ok=True)
            draft = Draft(directory, KIND, asdict(self), {})
            this = Round(self, directory)
            draft.metrics = this.run()
            draft.publish("raw/*/*.warc.gz")
        counts = ", ".join(f"{state} {number:,}" for state, number in draft.metrics["pages"].items())
        last = draft.metrics["rounds"][-1]
        print(
            f"{directory}: round {this.name} asked for {last['asked']:,} pages, stored {last['stored']:,}, "
            f"{last['unchanged']:,} were unchanged; all pages: {counts}",
            flush=True,
        )
        return 0
