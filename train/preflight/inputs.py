"""Inputs: tokenizer, shards and weights belong together, are whole, and are the same ones on every machine."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from conf.errors import LongrunError
from train.models.hf_weights import Stored
from train.preflight.base import Finding, Record, Site, by_host, who

if TYPE_CHECKING:
    from train.preflight.limits import Preflight


def measure(site: Site) -> dict[str, Any] | None:
    """Every problem with what the run reads, and fingerprints of it. What all ranks must open for the run anyway is
    opened here, on all; the machine's first rank looks at the files beside."""
    config, start = site.config, site.start
    if start is None:
        return None
    weights, architecture = start.weights, start.architecture
    reads: list[Callable[[], object]] = [lambda: start.open(config, "train"), lambda: start.open(config, "validation")]
    if weights is not None and site.leads:
        reads.append(lambda: Stored(weights, architecture))
    problems = [problem for read in reads if (problem := _problem(read))]
    if not site.leads:
        return {"problems": problems, "fingerprints": start.fingerprints}
    for name, artifact in start.inputs.items():
        problems += [f"{name} ({artifact.path}): {damage}" for damage in artifact.damage(contents=False)]
    return {"problems": problems, "fingerprints": start.fingerprints}


def _problem(read: Callable[[], object]) -> str:
    try:
        read()
    except LongrunError as error:
        return str(error)
    return ""


def judge(records: Sequence[Record], limits: "Preflight") -> list[Finding]:
    """Problems, each with the machines that have it; and machines that see other inputs than most."""
    having = [record for record in records if "inputs" in record.found]
    problems: dict[str, list[Record]] = {}
    for record in having:
        for problem in record.found["inputs"]["problems"]:
            problems.setdefault(problem, []).append(record)
    found = [Finding("inputs", [r.rank for r in there], f"{who(there)}: {text}") for text, there in problems.items()]
    for name in sorted({name for record in having for name in record.found["inputs"]["fingerprints"]}):
        read = [record for record in having if record.found["inputs"]["fingerprints"]]
        seen = {record.rank: record.found["inputs"]["fingerprints"].get(name, "none") for record in read}
        usual = Counter(seen.values()).most_common(1)[0][0]
        for there in by_host([record for record in read if seen[record.rank] != usual]).values():
            text = (
                f"{who(there)}: its {name} is {seen[there[0].rank]}, that of the others {usual} (fingerprints): copy "
                "it there again, or give a path that all machines share."
            )
            found.append(Finding("inputs", [record.rank for record in there], text))
    return found
