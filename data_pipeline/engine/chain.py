"""A run of curation steps over one piece, in one pass."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.jsonl import JsonlWriter

from data_pipeline.engine.pieces import quarantine
from data_pipeline.page import Page
from data_pipeline.steps.base import Step

IN, JUDGED, OUT = "documents_in", "judged", "documents_out"
CHARACTERS_IN, CHARACTERS_OUT = "characters_in", "characters_out"


class Curate(PipelineStep):
    """Hands each document from step to step until one drops it.

    Args:
        steps: by name, in order.
        survey: what the step's survey found; only a step that is alone has one.
        dropped: where documents in quarantine go.
    """

    name = "⚖️ Curate"
    type = "🔻 - FILTER"

    def __init__(self, steps: Mapping[str, Step], survey: Path, dropped: Path):
        super().__init__()
        self.steps = steps
        self.survey = survey
        self.dropped: JsonlWriter = quarantine(dropped)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        judges = [(name, step, step.verdicts(self.survey, rank)) for name, step in self.steps.items()]
        tally: Counter[tuple[str, str]] = Counter()
        with self.dropped:
            for number, document in enumerate(data):
                page = Page(document.text, document.id, document.metadata)
                for name, step, judge in judges:
                    given = len(page.text)
                    tally[name, IN] += 1
                    tally[name, CHARACTERS_IN] += given
                    if step.judges(page):
                        tally[name, JUDGED] += 1
                        before = page.text
                        reason = judge(number, page)
                        if page.counts:
                            for label, count in page.counts.items():
                                tally[name, f"count\t{label}"] += count
                            page.counts.clear()
                        if reason is None and page.text is not before and not page.text.strip():
                            reason = "empty"
                        if reason is not None:
                            tally[name, f"dropped\t{reason}"] += 1
                            metadata = {**page.metadata, "filter_step": name, "filter_reason": reason}
                            left = page.text if step.hides else before
                            self.dropped.write(Document(left, page.id, metadata=metadata), rank)
                            break
                    tally[name, OUT] += 1
                    tally[name, CHARACTERS_OUT] += len(page.text)
                else:
                    document.text, document.metadata = page.text, page.metadata
                    yield document
        for (name, label), total in tally.items():
            self.stat_update(f"{name}\t{label}", value=total)


def curated(names: list[str], totals: Counter[str]) -> list[dict[str, Any]]:
    """What `Curate` counted, step by step, as the manifest has it."""
    found = []
    for name in names:
        own = {
            label.removeprefix(f"{name}\t"): total for label, total in totals.items() if label.startswith(f"{name}\t")
        }
        found.append(
            {
                "name": name,
                **{key: own.get(key, 0) for key in (IN, JUDGED, OUT, CHARACTERS_IN, CHARACTERS_OUT)},
                "dropped": labelled(own, "dropped\t"),
                "counts": labelled(own, "count\t"),
            }
        )
    return found


def labelled(totals: Mapping[str, int], beginning: str) -> dict[str, int]:
    """The totals whose labels begin so, under the rest of their labels."""
    return {
        label.removeprefix(beginning): total for label, total in sorted(totals.items()) if label.startswith(beginning)
    }
