"""{"conversations": [{"from": "human" | "gpt" | ..., "value"}, ...], "system"?, "tools"?}: exports of chats."""

from typing import Any

from data_pipeline.formats.base import (
    CHAT,
    Converted,
    Format,
    Record,
    arguments_of,
    messages,
    offered,
    others,
    says,
    text,
    tools,
)
from data_pipeline.rows import UnfitRowError, parsed


@offered("sharegpt")
class ShareGPT(Format):
    """Turns are `from` and `value`; one from `function_call` holds {"name", "arguments"}, or a list of those."""

    keys = ("conversations",)

    def convert(self, record: Record, faults: list[str]) -> list[Converted]:
        head = [says("system", text(record, "system", faults))] if record.get("system") else []
        said = record["conversations"]
        openai = isinstance(said, list) and any(isinstance(turn, dict) and "role" in turn for turn in said)
        names = {} if openai else {"role": "from", "content": "value"}
        converted = messages(said, "conversations", faults, **names)
        for number, turn in enumerate(converted):
            if turn["role"] == "function_call":
                calls = _calls(turn["content"], f"conversations[{number}]", faults)
                turn |= {"role": "assistant", "content": "", "tool_calls": calls}
        left = others(record, "conversations", "system")
        return [Converted(CHAT, {"messages": head + converted, **tools(record, faults), **left})]


def _calls(content: Any, where: str, faults: list[str]) -> list[Record]:
    """What a turn from `function_call` calls."""
    try:
        value = parsed(content.encode()) if isinstance(content, str) else content
    except UnfitRowError as unfit:
        faults.append(f"{where}.value: {unfit.fault}")
        return []
    calls = value if isinstance(value, list) else [value]
    converted = []
    for call in calls:
        if not isinstance(call, dict) or "name" not in call:
            faults.append(f'{where}.value is no call; expected {{"name": ..., "arguments": {{...}}}}')
            continue
        arguments = arguments_of(call.get("arguments", call.get("parameters")), f"{where}.value.arguments", faults)
        converted.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return converted
