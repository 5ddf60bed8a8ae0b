"""{"prompt", "completion"}: texts, or messages."""

from data_pipeline.formats.base import CHAT, Converted, Format, Record, offered, others, tools, turns


@offered("completion")
class Completion(Format):
    """A text is one turn: the prompt the user's, the completion the assistant's."""

    keys = ("prompt", "completion")

    def convert(self, record: Record, faults: list[str]) -> list[Converted]:
        asked = turns(record["prompt"], "prompt", "user", faults)
        answer = turns(record["completion"], "completion", "assistant", faults)
        return [Converted(CHAT, {"messages": asked + answer, **tools(record, faults), **others(record)})]
