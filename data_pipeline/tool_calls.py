"""Tools that a model may call: what a conversation declares, calls and hears back.

Shapes are those of OpenAI's protocol, in which transformers' templates read them, but that the arguments of a call are
an object instead of JSON within text:

    tools       [{"type": "function", "function": {"name", "description", "parameters": JSON schema}}]
    assistant   {"role", "content", "tool_calls": [{"id", "type": "function", "function": {"name", "arguments": {}}}]}
    result      {"role": "tool", "tool_call_id", "content"}
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""What a function may be called."""


def tool_faults(tools: Any) -> list[str]:
    """What keeps `tools` from being a list of declared functions.

    Args:
        tools: the value found.
    """
    if not isinstance(tools, list) or not tools:
        return [f"tools is {type(tools).__name__}; expected a list of functions, or no such key"]
    faults, names = [], []
    for number, tool in enumerate(tools):
        where = f"tools[{number}]"
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            faults.append(f'{where} is no function; expected {{"type": "function", "function": {{"name": ...}}}}')
            continue
        if not _is_name(function.get("name")):
            faults.append(f"{where}.function.name is {function.get('name')!r}; expected letters, digits, _ . -")
        elif function["name"] in names:
            faults.append(f"{where}.function.name {function['name']} is declared twice")
        else:
            names.append(function["name"])
        if "parameters" in function and (fault := _schema_fault(function["parameters"])):
            faults.append(f"{where}.function.parameters is no JSON schema of an object: {fault}")
    return faults


def call_faults(calls: Any, where: str) -> list[str]:
    """What keeps the `tool_calls` of a message from being calls.

    Args:
        calls: the value found.
        where: in which message, for the fault.
    """
    if not isinstance(calls, list) or not calls:
        return [f"{where}.tool_calls is {type(calls).__name__}; expected a list of calls, or no such key"]
    faults = []
    for number, call in enumerate(calls):
        place = f"{where}.tool_calls[{number}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            faults.append(f'{place} is no call; expected {{"function": {{"name": ..., "arguments": {{...}}}}}}')
            continue
        if not _is_name(function.get("name")):
            faults.append(f"{place}.function.name is {function.get('name')!r}; expected letters, digits, _ . -")
        if not isinstance(function.get("arguments"), dict):
            found = type(function.get("arguments")).__name__
            faults.append(f"{place}.function.arguments is {found}; expected an object (corpus=chats reads JSON text)")
        if not isinstance(call.get("id", ""), str):
            faults.append(f"{place}.id is {call['id']!r}; expected text")
    return faults


def exchange_faults(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> list[str]:
    """What is wrong between calls, results and declared tools.

    A result follows the turn that called and names one of its calls (or none of them has an id, and results come in the
    order of the calls). Every call is answered, once, before the conversation goes on; the last turn's need not be.

    Args:
        messages: each without fault.
        tools: without fault; None where the record declares none, and calls are not checked against them.
    """
    faults: list[str] = []
    waiting: list[str | None] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message["role"] != "tool":
            if waiting:
                faults.append(f"{where} comes before {len(waiting)} calls were answered; expected their results first")
            waiting = [call.get("id") for call in message.get("tool_calls", [])]
            if len(set(waiting) - {None}) + waiting.count(None) < len(waiting):
                faults.append(f"{where}.tool_calls use an id twice; expected one id a call")
            for place, call in enumerate(message.get("tool_calls", [])):
                faults += _argument_faults(f"{where}.tool_calls[{place}]", call["function"], tools)
        elif (identity := message.get("tool_call_id")) in waiting:
            waiting.remove(identity)
        else:
            open_calls = ", ".join(str(call) for call in waiting) or "none"
            faults.append(f"{where}.tool_call_id is {identity!r}; expected one of the calls that wait: {open_calls}")
    return faults


def _argument_faults(where: str, function: dict[str, Any], tools: Sequence[dict[str, Any]] | None) -> Iterator[str]:
    """What is wrong with one call, given the declared tools."""
    if tools is None:
        return
    declared = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    if function["name"] not in declared:
        yield f"{where} calls {function['name']}; the declared tools are {', '.join(declared)}"
    elif schema := declared[function["name"]]:
        from jsonschema import Draft202012Validator
        from referencing import Registry
        from referencing.exceptions import Unresolvable

        # A registry of its own: a reference to elsewhere must not fetch anything.
        validator = Draft202012Validator(schema, registry=Registry())
        try:
            for error in validator.iter_errors(function["arguments"]):
                place = ".".join(map(str, error.path))
                yield f"{where}.function.arguments{'.' + place if place else ''}: {error.message[:200]}"
        except Unresolvable as error:
            yield f"the parameters of {function['name']} refer to {error.ref}, which is not in them"
        except RecursionError:
            yield f"the parameters of {function['name']} refer to themselves without end"


def _schema_fault(schema: Any) -> str:
    """Why it is no schema of an object; empty where it is one."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        return 'expected {"type": "object", "properties": {...}}'
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        return error.message[:200]
    return ""


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None
