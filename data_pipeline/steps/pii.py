"""Personal data and secrets: replaced, tagged, or a reason to drop the document."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

from conf.errors import Problem
from conf.registry import register
from data_pipeline import personal
from data_pipeline.page import Page
from data_pipeline.personal.spans import replaced
from data_pipeline.steps.base import DocumentStep

ACTIONS = ("replace", "tag", "drop", "keep")
TAG = "pii"
"""Metadata key: kind -> how many were found."""


@register("corpus/step", "pii")
@dataclass(frozen=True)
class PII(DocumentStep):
    """Find personal data by kind, and do with each kind what its field says.

    Actions: `replace` puts the kind's placeholder in its place; `tag` writes the number found to the metadata; `drop`
    puts the document in quarantine, with placeholders for all that was found; `keep` does not look for it. What is
    found is counted by kind in the manifest; the text of it is written nowhere.

    Args:
        secret: passwords, private keys, keys of known services, and what looks random and is called a key or token.
        email: e-mail addresses under a top-level domain that exists.
        iban: international bank account numbers.
        card: numbers of payment cards.
        national_id: numbers that states give to people; see data_pipeline/personal/identifiers.py.
        phone: telephone numbers.
        ip: public addresses of IP, versions 4 and 6.
        regions: countries (ISO 3166, two letters) whose phone numbers are known without their international prefix.
        placeholders: kind -> what replaces it; a kind that is not named is replaced by its name, as in <EMAIL>.
    """

    topic: ClassVar[str] = "personal"
    hides: ClassVar[bool] = True

    secret: str = "replace"
    email: str = "replace"
    iban: str = "replace"
    card: str = "replace"
    national_id: str = "replace"
    phone: str = "replace"
    ip: str = "replace"
    regions: list[str] = field(default_factory=lambda: ["US", "GB"])
    placeholders: dict[str, str] = field(default_factory=dict)

    def problems(self, key: str) -> list[Problem]:
        import phonenumbers

        found = super().problems(key)
        for kind in personal.KINDS:
            if self.action(kind) not in ACTIONS:
                found.append(Problem(f"{key}.{kind}", self.action(kind), f"one of {', '.join(ACTIONS)}"))
        known = phonenumbers.SUPPORTED_REGIONS
        for region in self.regions:
            if region not in known:
                found.append(Problem(f"{key}.regions", region, "countries as two capital letters, such as US or DE"))
        for kind, placeholder in self.placeholders.items():
            if kind not in personal.KINDS:
                found.append(Problem(f"{key}.placeholders", kind, f"kinds of {', '.join(personal.KINDS)}"))
            elif personal.find(placeholder):
                fix = "what is not itself taken for personal data, such as <EMAIL>"
                found.append(Problem(f"{key}.placeholders.{kind}", placeholder, fix))
        return found

    def state(self) -> Any:
        from importlib.metadata import version

        return {name: version(name) for name in ("python-stdnum", "phonenumberslite", "tldextract")}

    def judge(self, page: Page) -> str | None:
        kinds = [kind for kind in personal.KINDS if self.action(kind) != "keep"]
        found = personal.find(page.text, kinds, self.regions)
        if not found:
            return None
        counts = Counter(one.kind for one in found)
        page.counts.update(counts)
        dropping = [kind for kind in kinds if self.action(kind) == "drop" and counts[kind]]
        if tagged := {kind: counts[kind] for kind in kinds if self.action(kind) == "tag" and counts[kind]}:
            page.metadata[TAG] = tagged
        kind_at = {one.begin: one.kind for one in found if dropping or self.action(one.kind) == "replace"}
        spans = [(one.begin, one.end) for one in found if one.begin in kind_at]
        page.text = replaced(page.text, spans, lambda begin, end: self.placeholder(kind_at[begin]))
        return dropping[0] if dropping else None

    def action(self, kind: str) -> str:
        return str(getattr(self, kind))

    def placeholder(self, kind: str) -> str:
        return self.placeholders.get(kind, f"<{kind.upper()}>")
