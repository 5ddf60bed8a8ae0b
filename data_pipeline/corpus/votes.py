"""corpus=votes: preferences that several annotators decided, with how far they agree."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import Problem
from conf.registry import register
from data_pipeline.agreement import MAJORITY, NOMINAL, RULES, decided, report, standing
from data_pipeline.artifact import sha256_of
from data_pipeline.config import DataSet, PipelineConfig
from data_pipeline.examples import Example, Ledger, converted
from data_pipeline.formats.base import PREFERENCE, Record
from data_pipeline.publishing import parted, published
from data_pipeline.rows import Row
from data_pipeline.votes import TIE, preference, read_items, read_votes


@register("corpus", "votes")
@dataclass(frozen=True)
class VotedPreferences(DataSet):
    """Pairs of answers and the votes of annotators as preferences that training reads. What they did not decide is in
    quarantine with its votes; the manifest's metrics have agreement, disagreements and annotators that stand apart.

    Args:
        items: file of {"id", "prompt", "responses": [a, b]}.
        votes: files of {"item", "annotator", "label": "a" | "b" | "tie"}, one for all annotators or one each.
        rule: "majority" takes what more than half voted, "unanimity" only what all did.
        least: votes that an item needs; at least 1.
        leave_out_weak: decide without the votes of annotators who agree with the others' majority significantly and by
            at least 10 points less than they do among themselves.
        validation: share of the prompts whose records become the validation split, chosen by hash; in (0, 1).
        test: likewise for the test split; in [0, 1).
    """

    items: str = ""
    votes: list[str] = field(default_factory=list)
    rule: str = MAJORITY
    least: int = 2
    leave_out_weak: bool = False
    validation: float = 0.02
    test: float = 0.0

    def problems(self, config: PipelineConfig, world_size: int) -> list[Problem]:
        found = []
        for key, files in (("corpus.items", [self.items]), ("corpus.votes", self.votes)):
            if not files or not all(files):
                found.append(Problem(key, files, "a file of such records; see docs/post_training_data.md"))
            found += [Problem(key, file, "a file that exists") for file in files if file and not Path(file).is_file()]
        if self.rule not in RULES:
            found.append(Problem("corpus.rule", self.rule, f"one of {', '.join(RULES)}"))
        if self.least < 1:
            found.append(Problem("corpus.least", self.least, "at least 1 vote"))
        if not (0 < self.validation < 1 and 0 <= self.test < 1 and self.validation + self.test < 1):
            shares = f"{self.validation}, {self.test}"
            found.append(Problem("corpus.validation, corpus.test", shares, "shares above 0 and together below 1"))
        return found

    def run(self, config: PipelineConfig, resolved: dict[str, Any]) -> int:
        """Read, measure, decide, split, publish.

        Raises:
            RecordError: lists every item or vote with a fault.
            EmptySetError: nothing was decided, or a split would be empty.
            OccupiedError: the directory holds an artifact of another kind.
        """
        recipe = {
            "rule": self.rule,
            "least": self.least,
            "leave_out_weak": self.leave_out_weak,
            "validation": self.validation,
            "test": self.test,
            "items": sha256_of(Path(self.items)),
            "votes": [sha256_of(Path(file)) for file in self.votes],
        }
        return published(Path(config.run_dir), recipe, self._made)

    def _made(self, ledger: Ledger) -> dict[str, list[Record]]:
        items = read_items(Path(self.items))
        votes = read_votes([Path(file) for file in self.votes], items)
        measured = report(votes, NOMINAL)
        disagreements = [
            {"item": item, "votes": given} for item, given in votes.items() if len(set(given.values())) > 1
        ]
        ledger.findings = {"agreement": measured, "disagreements": disagreements}
        _tell(measured, len(disagreements))
        weak = {one.annotator for one in standing(votes) if one.weak} if self.leave_out_weak else set()
        examples, dropped = [], []
        for number, (item, given) in enumerate(votes.items(), 1):
            counted = {annotator: label for annotator, label in given.items() if annotator not in weak}
            winner = decided(list(counted.values()), self.rule)
            reason, fault = "", ""
            if len(counted) < self.least:
                reason, fault = "too_few_votes", f"{len(counted)} votes; expected at least {self.least}"
            elif winner is None:
                reason, fault = f"no_{self.rule}", "the annotators did not decide"
            elif winner == TIE:
                reason, fault = TIE, "neither answer is better"
            else:
                row = Row(number, preference(items[item], counted, winner))
                made, _, reason, faults = converted(row, PREFERENCE, {}, PREFERENCE)
                reason, fault = (reason, "; ".join(faults)) if faults else ("", "")
                examples += [Example(one.kind, one.record, item, "train") for one in made if not faults]
            if reason:
                dropped.append({"reason": reason, "fault": fault, "place": item, "record": items[item], "votes": given})
        ledger.enter("decide", len(votes), len(examples), dropped)
        return parted(examples, self.validation, self.test, self.items)


def _tell(measured: dict[str, Any], disagreements: int) -> None:
    """Say how far the annotators agree, and name those who stand apart."""

    def shown(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.3f}"

    print(
        f"{measured['votes']} votes on {measured['items']} items: Krippendorff's alpha "
        f"{shown(measured['krippendorff_alpha'])}, Fleiss' kappa {shown(measured['fleiss_kappa'])}, {disagreements} "
        "items on which they disagree",
        flush=True,
    )
    for one in measured["annotators"]:
        if one["weak"]:
            print(
                f"{one['annotator']} agrees with the others' majority on {one['agreement']:.0%} of {one['compared']} "
                f"items, the others on {one['others']:.0%} (p {one['p']:.1g}): look at these votes, or set "
                "corpus.leave_out_weak=true",
                flush=True,
            )
