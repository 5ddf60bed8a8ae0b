"""Conversations with tools, for tests of templates and of records."""

from tests.data_pipeline.chats import CONVERSATION

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of today.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [WEATHER, CLOCK]


def call(name: str, identity: str | None = None, **arguments) -> dict:
    named = {} if identity is None else {"id": identity}
    return {**named, "type": "function", "function": {"name": name, "arguments": arguments}}


def asks(content: str) -> dict:
    return {"role": "user", "content": content}


def answers(content: str, *calls: dict) -> dict:
    return {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {})}


def result(content: str, identity: str | None = None) -> dict:
    return {"role": "tool", "content": content, **({} if identity is None else {"tool_call_id": identity})}


ONE_CALL = [
    {"role": "system", "content": "Be brief."},
    asks("What of Über?"),
    answers("", call("weather", "a", city="Über", days=2)),
    result('{"sky": "blue"}', "a"),
    answers("It is blue."),
    asks("Yes?"),
    answers("Yes, sir."),
]
TWO_CALLS = [
    asks("What of the dog?"),
    answers("Lazy.", call("weather", "a", city="dog"), call("clock", "b")),
    result("over", "a"),
    result("4", "b"),
    answers("It is 4."),
]
BY_NAME = {"turns": (CONVERSATION, None), "one_call": (ONE_CALL, TOOLS), "two_calls": (TWO_CALLS, TOOLS)}
