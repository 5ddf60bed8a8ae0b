"""{"messages": [{"role", "content"}, ...]}: OpenAI's, and our own."""

from data_pipeline.formats.base import CHAT, Converted, Format, Record, messages, offered, others, tools


@offered("messages")
class Messages(Format):
    """Conversations in OpenAI's protocol, calls of tools included."""

    keys = ("messages",)

    def convert(self, record: Record, faults: list[str]) -> list[Converted]:
        converted = {"messages": messages(record["messages"], "messages", faults), **tools(record, faults)}
        return [Converted(CHAT, {**converted, **others(record)})]
