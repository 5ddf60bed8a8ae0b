"""Talking to a run and to a server: the same conversation, streamed; every refusal is one clear message."""

import io
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from conf.errors import ConfigError
from data_pipeline import chat as template
from data_pipeline.tokenizer import Tokenizer
from tests.train.exports import trained_run
from tools import api_key
from tools.chat import ChatConfig, main, quoted
from tools.speaker import ChatError, Embedded, Remote
from train.generate import Sampling
from train.models import hf

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    trained_run(root / "sft")
    trained_run(root / "pretrain", kind="pretrain")
    return root


class Handler(BaseHTTPRequestHandler):
    """A server that repeats the last message, piece by piece, and knows one key."""

    key = "right"
    ending = "data: [DONE]\n\n"
    asked: list[dict] = []

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def refused(self) -> bool:
        if self.headers.get("Authorization") != f"Bearer {self.key}":
            self.answer(401, '{"error": "Unauthorized"}')
            return True
        return False

    def do_GET(self) -> None:
        if not self.refused():
            self.answer(200, '{"data": [{"id": "parrot"}]}')

    def do_POST(self) -> None:
        if self.refused():
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if body["max_tokens"] > 1000:
            self.answer(400, '{"error": {"message": "max_tokens is too large"}}')
            return
        said = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        events = [": a comment\n\n", 'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n']
        for piece in said.split(" "):
            choice = {"delta": {"content": piece}} if "messages" in body else {"text": piece}
            events.append(f"data: {json.dumps({'choices': [choice]})}\n\n")
        self.answer(200, "".join(events) + self.ending)


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Handler.asked = []
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


KEY = api_key.ApiKey("right", "$KEY")


def test_a_run_answers_in_its_chat_template_and_stops_at_the_end_of_turn(runs):
    speaker = Embedded(str(runs / "sft"), "auto")
    assert speaker.chats and "<|im_end|>" in speaker.ends
    tokenizer = Tokenizer.load(runs / "sft" / "model")
    expected = speaker.generator.complete([template.prompt(tokenizer, HELLO)], Sampling(24, stop=speaker.ends))
    pieces = list(speaker.answer(HELLO, Sampling(24)))
    assert len(pieces) > 1, "the answer comes in pieces"
    assert "".join(pieces) == expected[0]


def test_a_base_model_continues_text_unless_asked_to_chat(runs):
    base = Embedded(str(runs / "pretrain"), "auto")
    assert not base.chats
    plain = base.generator.complete([base.tokenizer.encode("Hello")], Sampling(16))
    assert "".join(base.answer(HELLO, Sampling(16))) == plain[0]
    assert Embedded(str(runs / "pretrain"), "chat").chats


def test_one_prompt_prints_one_answer_for_scripts(runs, capsys):
    assert main(ChatConfig(target=str(runs / "sft"), prompt="Hello", max_tokens=8), {}) == 0
    out = capsys.readouterr().out
    expected = "".join(Embedded(str(runs / "sft"), "auto").answer(HELLO, Sampling(8)))
    assert out == expected + "\n"


def test_the_conversation_is_remembered_until_it_is_reset(url, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("one two\n\nthree\n/reset\nfour\n/exit\nnever\n"))
    monkeypatch.setenv(api_key.VARIABLE, "right")
    assert main(ChatConfig(target=url, system="Be brief."), {}) == 0
    roles = [[message["role"][0] for message in body["messages"]] for body in Handler.asked]
    assert roles == [["s", "u"], ["s", "u", "a", "u"], ["s", "u"]]
    assert Handler.asked[1]["messages"][2]["content"] == "onetwo"
    assert capsys.readouterr().out == "onetwo\nthree\nfour\n"


def test_a_conversation_longer_than_the_model_takes_can_go_on_after_a_reset(runs, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("x " * 600 + "\nHello\n"))
    assert main(ChatConfig(target=str(runs / "sft"), max_tokens=4), {}) == 0
    captured = capsys.readouterr()
    assert "max_positions is 512" in captured.err and "/reset starts anew" in captured.err
    assert captured.out.strip(), "the second message is answered"


def test_sampling_settings_reach_the_server(url):
    speaker = Remote(url + "/v1/", KEY)
    assert speaker.name == "parrot"
    pieces = list(speaker.answer([{"role": "user", "content": "a b"}], Sampling(9, 0.5, 0.9, 7, ("END",), 3)))
    assert pieces == ["a", "b"]
    sent = Handler.asked[0]
    assert [sent[key] for key in ("max_tokens", "temperature", "top_p", "top_k", "seed")] == [9, 0.5, 0.9, 7, 3]
    assert sent["stop"] == ["END"] and sent["stream"] is True


def test_a_server_can_continue_text(url):
    assert list(Remote(url, KEY, chats=False).answer(HELLO, Sampling(8))) == ["Hello"]
    assert Handler.asked[0]["prompt"] == "Hello"


def test_a_wrong_or_missing_key_is_told_apart(url):
    with pytest.raises(ChatError, match="refuses the API key that was sent"):
        Remote(url, api_key.ApiKey("wrong", ""))
    with pytest.raises(ChatError, match=r"without an API key.*LONGRUN_API_KEY"):
        Remote(url, None)


def test_what_the_server_says_is_passed_on(url):
    with pytest.raises(ChatError, match=r"400.*max_tokens is too large"):
        list(Remote(url, KEY).answer(HELLO, Sampling(2000)))


@pytest.mark.parametrize(
    ("ending", "message"),
    [("", "middle of an answer"), ('data: {"error": {"message": "out of memory"}}\n\n', "broke off: out of memory")],
)
def test_an_answer_that_breaks_off_is_an_error(ending, message, url, monkeypatch):
    monkeypatch.setattr(Handler, "ending", ending)
    with pytest.raises(ChatError, match=message):
        list(Remote(url, KEY).answer(HELLO, Sampling(8)))


def test_no_server_and_no_model_are_one_message_each(tmp_path):
    with pytest.raises(ChatError, match=r"cannot be reached.*make serve"):
        Remote("http://127.0.0.1:9", KEY)
    with pytest.raises(hf.HuggingFaceError, match="there is no such directory"):
        Embedded(str(tmp_path / "nothing"), "auto")


def test_a_key_is_made_once_for_its_owner_only_and_never_shown(tmp_path, monkeypatch):
    monkeypatch.delenv(api_key.VARIABLE, raising=False)
    key = api_key.read_or_make(tmp_path)
    assert key.file is not None and key.file.stat().st_mode & 0o777 == 0o600
    assert len(key.value) >= 32 and key.value not in repr(key)
    assert api_key.read_or_make(tmp_path) == key
    os.chmod(key.file, 0o644)
    with pytest.raises(api_key.ApiKeyError, match="chmod 600"):
        api_key.read_or_make(tmp_path)
    monkeypatch.setenv(api_key.VARIABLE, "mine, and long enough")
    assert api_key.read_or_make(tmp_path).value == "mine, and long enough"


@pytest.mark.parametrize(
    "text", ["Hello, world", "a=b, {c: [d]} (e)", r"${x} \${y} \\${z}", 'it\'s "this"\\', "日本 🙂\ntwo", "'", "", " "]
)
def test_any_prompt_survives_the_command_line(text):
    with initialize_config_module("conf", version_base="1.3"):
        node = compose("chat", overrides=quoted([f"prompt={text}"]))
        assert node.prompt == text


def test_an_unknown_mode_is_refused():
    from conf import entry

    with (
        initialize_config_module("conf", version_base="1.3"),
        pytest.raises(ConfigError, match="mode=talk: one of auto, chat, complete"),
    ):
        entry.typed(compose("chat", overrides=["mode=talk"]), ChatConfig)
