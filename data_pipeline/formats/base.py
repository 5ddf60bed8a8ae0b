"""What a format is, and the parts that several share.

A format has the names that its records hold, and turns a record into examples in our own shapes. Recognising is by
names alone: of the formats whose names are all there, the one with the most of them, if it is one.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_pipeline.records import found

CHAT, PREFERENCE, KTO = "chat", "preference", "kto"
"""Kinds of examples."""

ROLES = {
    "human": "user",
    "developer": "system",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
"""What others call the roles that we call otherwise."""

OWN = ("messages", "prompt", "chosen", "rejected", "completion", "label", "tools")
"""Names that mean something in our own shapes."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Converted:
    """One record in our own shape.

    Args:
        kind: CHAT, PREFERENCE or KTO.
        record: as `data_pipeline.chat`, `.preference` or `.kto` describe it.
    """

    kind: str
    record: Record


class Format:
    """One way to write records down. Subclasses are offered with `@offered("name")`."""

    keys: tuple[str, ...] = ()
    """Names by which a record is recognised."""

    def convert(self, record: Record, faults: list[str]) -> list[Converted]:
        """A record in our own shapes. What is no part of the format goes along unchanged, unless our own shapes use
        its name.

        Args:
            record: has all `keys`; not changed.
            faults: what is wrong with the record is appended here, and then the result does not count.
        """
        raise NotImplementedError


FORMATS: dict[str, Format] = {}
"""Name -> format."""


def offered(name: str) -> Callable[[type[Format]], type[Format]]:
    """Offer a format by a name."""

    def decorate(cls: type[Format]) -> type[Format]:
        FORMATS[name] = cls()
        return cls

    return decorate


def recognised(record: Record) -> list[str]:
    """Names of the formats whose names are all in the record, those with the most of them: one, unless none fits or it
    cannot be told. A null is as if absent, but for a label's: that one is missing, not another kind of example."""
    there = {key for key, value in record.items() if value is not None or key == "label"}
    fitting = sorted(name for name, form in FORMATS.items() if there.issuperset(form.keys))
    most = max((len(FORMATS[name].keys) for name in fitting), default=0)
    return [name for name in fitting if len(FORMATS[name].keys) == most]


def others(record: Record, *taken: str) -> Record:
    """What of a record is no part of its format nor has a name of our own shapes: source, licence, id and the like."""
    return rest(record, *OWN, *taken)


def rest(record: Record, *taken: str) -> Record:
    """What else there is. Tables write None for absent."""
    return {key: value for key, value in record.items() if key not in taken and value is not None}


def says(role: str, content: str) -> Record:
    return {"role": role, "content": content}


def text(record: Record, key: str, faults: list[str], *, may_be_empty: bool = False) -> str:
    """A text of a record; "" with a fault where it is none."""
    value = record.get(key)
    if isinstance(value, str) and (value.strip() or may_be_empty):
        return value
    if not (value is None and may_be_empty):
        faults.append(f"{key} is {found(value)}; expected text{'' if may_be_empty else ' that is not empty'}")
    return ""


def turns(value: Any, where: str, role: str, faults: list[str]) -> list[Record]:
    """Messages, given as such or as the text of one.

    Args:
        value: what was found.
        where: it was found, for faults.
        role: whose a bare text is.
        faults: see `Format.convert`.
    """
    if isinstance(value, str):
        if not value.strip():
            faults.append(f"{where} is empty; expected text")
        return [says(role, value)]
    return messages(value, where, faults)


def messages(value: Any, where: str, faults: list[str], role: str = "role", content: str = "content") -> list[Record]:
    """Messages of OpenAI's protocol in our own shape: roles by our names, content as text, arguments as objects.

    Args:
        value: what was found.
        where: it was found, for faults.
        faults: see `Format.convert`; faults that our own shapes have too are left to their check.
        role: the name that the speaker goes by.
        content: the name that what is said goes by.
    """
    value = _list(value)
    if not isinstance(value, list) or not value:
        faults.append(f"{where} is {found(value)}; expected a list of messages")
        return []
    converted = []
    for number, message in enumerate(value):
        place = f"{where}[{number}]"
        if not isinstance(message, dict):
            faults.append(f'{place} is {found(message)}; expected {{"{role}": ..., "{content}": ...}}')
            continue
        speaker = message.get(role)
        speaker = ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
        turn = {"role": speaker, "content": message.get(content), **rest(message, role, content)}
        if "tool_calls" in turn:
            turn["tool_calls"] = _calls(turn["tool_calls"], place, faults)
            if turn["tool_calls"] == []:
                del turn["tool_calls"]
        if turn["content"] is None and "tool_calls" in turn:
            turn["content"] = ""
        if isinstance(turn["content"], list):
            turn["content"] = _parts(turn["content"], place, faults)
        converted.append(turn)
    return converted


def tools(record: Record, faults: list[str]) -> Record:
    """{"tools": the declared functions in our own shape}, or nothing where a record declares none."""
    value = _list(record.get("tools"))
    if value is None or value == [] or value == "":
        return {}
    if not isinstance(value, list):
        faults.append(f"tools is {found(value)}; expected a list of functions")
        return {}
    bare = [isinstance(tool, dict) and "function" not in tool and "name" in tool for tool in value]
    return {
        "tools": [
            {"type": "function", "function": tool} if wrap else tool for tool, wrap in zip(value, bare, strict=True)
        ]
    }


def _list(value: Any) -> Any:
    """Some data sets keep lists as JSON within text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _calls(value: Any, where: str, faults: list[str]) -> Any:
    """Calls with their arguments as objects."""
    if not isinstance(value, list):
        return value
    converted = []
    for number, call in enumerate(value):
        if isinstance(call, dict) and "function" not in call and "name" in call:
            function = {"name": call["name"], "arguments": call.get("arguments")}
            call = {"function": function, **rest(call, "name", "arguments")}
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            arguments = call["function"].get("arguments")
            place = f"{where}.tool_calls[{number}].function.arguments"
            function = {**call["function"], "arguments": arguments_of(arguments, place, faults)}
            call = {**rest(call), "type": "function", "function": function}
        converted.append(call)
    return converted


def arguments_of(value: Any, where: str, faults: list[str]) -> Any:
    """Arguments of a call as an object, whether given as such or as JSON within text."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            faults.append(f"{where} is no JSON ({error}); expected an object")
            return {}
    if not isinstance(value, dict):
        faults.append(f"{where} is {found(value)}; expected an object")
        return {}
    return value


def _parts(parts: list[Any], where: str, faults: list[str]) -> str:
    """Content that is given in parts, as one text."""
    texts = []
    for part in parts:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            faults.append(f"{where}.content has a part {found(part)}; expected parts of text")
    return "".join(texts)
