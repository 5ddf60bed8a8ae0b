"""What the documents of a corpus are like, counted while they pass."""

import math
import re
from collections import Counter
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.card import bins
from data_pipeline.card.samples import COPIES

LABELS = ("kind", "language")
"""Metadata whose values are counted as they are."""
MOST_LABELS = 200
"""Values of one label that a piece tells apart; the others are counted together, so that any corpus fits in memory."""
OTHER = "other"
YEAR = re.compile(r"(?:19|20)\d\d(?=\D|$)")


class Portrait(PipelineStep):
    """Counts documents under ("kind", value), ("language", value), ("year", value), ("length", bin),
    ("score", name, bin) for every metadata value that is a fraction, ("copies", name, bin); see `card/bins.py`."""

    name = "🖼️ Portrait"
    type = "📊 - STATS"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        tally: Counter[tuple[str, ...]] = Counter()
        values: dict[str, set[str]] = {label: set() for label in LABELS}
        for document in data:
            metadata = document.metadata
            tally["length", str(bins.of_length(len(document.text)))] += 1
            year = YEAR.match(str(metadata.get("date", "")))
            tally["year", year[0] if year else ""] += 1
            for label in LABELS:
                if label in metadata:
                    value = str(metadata[label])
                    if len(values[label]) < MOST_LABELS:
                        values[label].add(value)
                    tally[label, value if value in values[label] else OTHER] += 1
            for name, value in metadata.items():
                if isinstance(value, float) and math.isfinite(value):
                    tally["score", name, str(bins.of_score(value))] += 1
                elif name.endswith(COPIES) and isinstance(value, int):
                    tally["copies", name, str(bins.of_length(value))] += 1
            yield document
        for name, count in tally.items():
            self.stat_update("\t".join(part.replace("\t", " ") for part in name), value=count)


def portrayed(totals: Counter[str]) -> dict[str, Any]:
    """What a Portrait counted: label -> value -> documents, one level deeper for scores and copies."""
    found: dict[str, Any] = {}
    for label, total in sorted(totals.items()):
        *above, value = label.split("\t")
        within = found
        for name in above:
            within = within.setdefault(name, {})
        within[value] = total
    return found
