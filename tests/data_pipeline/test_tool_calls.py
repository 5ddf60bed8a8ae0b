"""Tools: what is declared, called and answered must belong together."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from data_pipeline.chat import chat_faults
from tests.data_pipeline.conversations import ONE_CALL, TOOLS, TWO_CALLS, WEATHER, answers, asks, call, result


def declared(name="weather", **function) -> list:
    return [{"type": "function", "function": {"name": name, **function}}]


def turns(*messages, tools=None) -> dict:
    return {"messages": list(messages), **({} if tools is None else {"tools": tools})}


REFUSED = {
    "an empty list of tools": (turns(asks("a"), answers("b"), tools=[]), "tools is list; expected a list of functions"),
    "a bare function": (turns(asks("a"), answers("b"), tools=[WEATHER["function"]]), "tools[0] is no function"),
    "a name with blanks": (turns(asks("a"), answers("b"), tools=declared("two words")), "name is 'two words'"),
    "a name twice": (
        turns(asks("a"), answers("b"), tools=declared() * 2),
        "tools[1].function.name weather is declared",
    ),
    "no schema": (
        turns(asks("a"), answers("b"), tools=declared(parameters={"properties": {"x": {"type": "txt"}}})),
        "tools[0].function.parameters is no JSON schema of an object: 'txt' is not valid",
    ),
    "a schema of a list": (
        turns(asks("a"), answers("b"), tools=declared(parameters={"type": "array"})),
        "is no JSON schema",
    ),
    "no list of calls": (turns(asks("a"), {**answers(""), "tool_calls": {}}), "messages[1].tool_calls is dict"),
    "a call that is none": (
        turns(asks("a"), {**answers(""), "tool_calls": [3]}),
        "messages[1].tool_calls[0] is no call",
    ),
    "arguments in text": (
        turns(asks("a"), {**answers(""), "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}),
        "messages[1].tool_calls[0].function.arguments is str; expected an object",
    ),
    "a user that calls": (turns({**asks("a"), "tool_calls": [call("f")]}, answers("b")), "messages[0] has tool_calls"),
    "an unknown tool": (
        turns(asks("a"), answers("", call("rain")), tools=TOOLS),
        "calls rain; the declared tools are weather",
    ),
    "a lacking argument": (
        turns(asks("a"), answers("", call("weather", days=1)), tools=TOOLS),
        "messages[1].tool_calls[0].function.arguments: 'city' is a required property",
    ),
    "an argument of another type": (
        turns(asks("a"), answers("", call("weather", city="b", days="two")), tools=TOOLS),
        "function.arguments.days: 'two' is not of type 'integer'",
    ),
    "a result without a call": (
        turns(asks("a"), result("b"), answers("c")),
        "expected one of the calls that wait: none",
    ),
    "a result of another call": (
        turns(asks("a"), answers("", call("f", "x")), result("b", "y")),
        "messages[2].tool_call_id is 'y'; expected one of the calls that wait: x",
    ),
    "a result without its id": (
        turns(asks("a"), answers("", call("f", "x")), result("b")),
        "messages[2].tool_call_id is None; expected one of the calls that wait: x",
    ),
    "a result twice": (
        turns(asks("a"), answers("", call("f", "x")), result("b", "x"), result("b", "x"), answers("c")),
        "messages[3].tool_call_id is 'x'",
    ),
    "a call that nobody answers": (
        turns(asks("a"), answers("", call("f", "x"), call("f", "y")), result("b", "x"), answers("c")),
        "messages[3] comes before 1 calls were answered",
    ),
    "an id twice": (turns(asks("a"), answers("", call("f", "x"), call("f", "x"))), "use an id twice"),
    "a schema that refers elsewhere": (
        turns(
            asks("a"),
            answers("", call("weather", city="b")),
            tools=declared(parameters={"$ref": "http://127.0.0.1:9/schema.json"}),
        ),
        "the parameters of weather refer to http://127.0.0.1:9/schema.json, which is not in them",
    ),
}


def test_a_schema_that_refers_elsewhere_fetches_nothing():
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        elsewhere = {"$ref": f"http://127.0.0.1:{server.server_port}/schema.json"}
        record = turns(asks("a"), answers("", call("weather")), tools=declared(parameters=elsewhere))
        assert len(chat_faults(record)) == 1
        server.shutdown()
        thread.join()
    assert not asked


@pytest.mark.parametrize("messages", [ONE_CALL, TWO_CALLS, TWO_CALLS[:2]], ids=["one", "two", "ends with calls"])
def test_conversations_with_tools_are_without_fault(messages):
    assert chat_faults({"messages": messages, "tools": TOOLS}) == []
    assert chat_faults({"messages": messages}) == []


def test_results_without_ids_answer_calls_without_ids_in_their_order():
    assert (
        chat_faults(turns(asks("a"), answers("", call("f"), call("g")), result("b"), result("c"), answers("d"))) == []
    )


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_with_place_and_expectation(case):
    record, fault = REFUSED[case]
    faults = chat_faults(record)
    assert len(faults) == 1 and fault in faults[0], faults
