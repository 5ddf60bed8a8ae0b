"""{"prompt", "completion", "label"}: one answer, and whether it is good (Ethayarajh et al. 2024, arXiv:2402.01306)."""

from data_pipeline.formats.base import KTO, Converted, Format, Record, offered, others, tools, turns
from data_pipeline.records import found


@offered("kto")
class Kto(Format):
    """The label is true or false, or 1 or 0."""

    keys = ("prompt", "completion", "label")

    def convert(self, record: Record, faults: list[str]) -> list[Converted]:
        converted = {
            "prompt": turns(record["prompt"], "prompt", "user", faults),
            "completion": turns(record["completion"], "completion", "assistant", faults),
            "label": record["label"] == 1,
        }
        if record["label"] not in (0, 1):
            faults.append(f"label is {found(record['label'])}; expected true or false")
        left = others(record)
        return [Converted(KTO, {**converted, **tools(record, faults), **left})]
