"""A judge's grades: from a real server and a real model, kept, resumable, and never made up."""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from conf.errors import ConfigError
from data_pipeline import judges
from data_pipeline.artifact import Artifact
from data_pipeline.chat import encode
from data_pipeline.corpus.chats import GRADES
from data_pipeline.judge import HOPELESS, Judging, grades
from data_pipeline.judges import JudgeError, Local, ReplyError
from data_pipeline.prompts import opening
from tests.data_pipeline.chats import tokenizer, write_jsonl
from tests.data_pipeline.conversations import TWO_CALLS, answers, asks
from tests.data_pipeline.test_chats import TALK, make, records
from tests.data_pipeline.test_examples import counts_add_up, quarantined


class Handler(BaseHTTPRequestHandler):
    """Replies as the server's `say(text of the request, number of the request)` says: text, a status, or bytes."""

    def do_GET(self) -> None:
        self.answer(200, json.dumps({"data": [{"id": "grader"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, body, self.headers.get("Authorization")))
            number = len(self.server.requests)
        said = self.server.say(body["messages"][0]["content"], number)
        if isinstance(said, int):
            self.answer(said, b"the server is busy")
        elif isinstance(said, bytes):
            self.answer(200, said)
        else:
            self.answer(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode())

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(say):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.say, server.requests, server.lock = say, [], threading.Lock()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(judges, "PAUSE_S", 0.0)


def number_of(text: str) -> int:
    """The n of "What is n?" that a request is about."""
    return int(re.search(r"What is (\d+)\?", text)[1])


def by_number(text: str, _: int) -> str:
    return f"Score: {number_of(text) % 10 + 1}"


def judged(tmp_path, url: str, **settings) -> None:
    others = {f"judge.{key}": value for key, value in settings.items()}
    make(tmp_path / "mine", tmp_path / "run", validation=0.2, **{"judge.target": url, **others})


def test_a_server_grades_and_the_threshold_decides(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGRUN_API_KEY", "secret")
    write_jsonl(tmp_path / "mine" / "train.jsonl", TALK)
    with serving(by_number) as (server, url):
        judged(tmp_path, f"{url}/v1", threshold=8)
        paths, bodies, keys = zip(*server.requests, strict=True)
    assert len(bodies) == 200 and set(paths) == {"/v1/chat/completions"} and set(keys) == {"Bearer secret"}
    assert bodies[0]["model"] == "grader" and bodies[0]["temperature"] == 0
    assert "user: What is " in bodies[0]["messages"][0]["content"]
    assert "from 1 (useless" in bodies[0]["messages"][0]["content"]
    kept = records(tmp_path / "run", "train") + records(tmp_path / "run", "validation")
    assert {(number_of(row["messages"][0]["content"]), row["grade"]) for row in kept} == {
        (n, n % 10 + 1) for n in range(200) if n % 10 + 1 >= 8
    }
    dropped = quarantined(tmp_path / "run")
    assert len(dropped) == 140 and {row["reason"] for row in dropped} == {"low_grade"}
    assert dropped[0]["fault"] == "grade 1; expected at least 8" and dropped[0]["record"]["grade"] == 1
    counts_add_up(tmp_path / "run")
    assert Artifact.read(tmp_path / "run").metrics["steps"][1]["counts"]["grade 10"] == 20
    assert not any(b"secret" in file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file())


def test_what_was_graded_is_not_asked_again(tmp_path):
    write_jsonl(tmp_path / "mine" / "train.jsonl", TALK[:100])
    with serving(by_number) as (server, url):
        judged(tmp_path, url, threshold=2)
        write_jsonl(tmp_path / "mine" / "train.jsonl", [*TALK[:100], *TALK[:10], *TALK[150:]])
        judged(tmp_path, url, threshold=3)
        assert len(server.requests) == 150
        judged(tmp_path, url, threshold=3, least=0)
        assert len(server.requests) == 300, "another question"


def test_a_run_that_was_stopped_asks_only_for_what_it_lacks(tmp_path):
    write_jsonl(tmp_path / "mine" / "train.jsonl", TALK)
    with serving(lambda text, n: by_number(text, n) if n <= 120 else 503) as (server, url):
        with pytest.raises(
            JudgeError, match=r"gave no grade for 80 of 200 questions; at most a share of judge.failures"
        ):
            judged(tmp_path, url, attempts=1)
        assert not (tmp_path / "run" / "manifest.json").exists()
        cache = tmp_path / "run" / GRADES
        cache.write_bytes(cache.read_bytes()[:-9])  # killed while it wrote
        server.say, server.requests[:] = by_number, []
        judged(tmp_path, url, attempts=1)
        assert len(server.requests) == 81
        assert sum(step["documents_in"] for step in Artifact.read(tmp_path / "run").metrics["steps"][1:]) == 200


RUBBISH = {
    "no words": ("I cannot say.", "no grades in the reply 'I cannot say.'"),
    "nothing": ("", "no grades in the reply ''"),
    "out of scale": ("Score: 11", "the grade 11 in the reply"),
    "several": ("Score: 3 or Score: 9", "2 grades in the reply"),
    "a number in passing": ("There are 7 reasons.", "no grades in the reply"),
    "no JSON": (b"<html>", "an answer that is not JSON"),
    "another JSON": (b'{"object": "list"}', "an answer without choices[0].message.content"),
    "no text": (b'{"choices": [{"message": {"content": null}}]}', "content is NoneType; expected text"),
    "refused": (400, "the server answers 400: 'the server is busy'"),
}


def test_rubbish_is_told_record_by_record_and_is_never_a_grade(tmp_path):
    write_jsonl(tmp_path / "mine" / "train.jsonl", TALK)
    replies = dict(enumerate(reply for reply, _ in RUBBISH.values()))

    def say(text: str, _: int):
        return replies.get(number_of(text), "Score: 9")

    with serving(say) as (_, url):
        judged(tmp_path, url, parallel=1)
    dropped = quarantined(tmp_path / "run")
    assert [row["place"] for row in dropped] == [f"train.jsonl:{line}" for line in range(1, len(RUBBISH) + 1)]
    for row, (_, fault) in zip(dropped, RUBBISH.values(), strict=True):
        assert row["reason"] == "no_grade" and fault in row["fault"] and "grade" not in row["record"]
    kept = records(tmp_path / "run", "train") + records(tmp_path / "run", "validation")
    assert len(kept) == 200 - len(RUBBISH) and all(row["grade"] == 9 for row in kept)


def test_a_judge_that_fails_from_the_start_is_given_up(tmp_path):
    write_jsonl(tmp_path / "mine" / "train.jsonl", TALK)
    with serving(lambda text, n: "rubbish") as (server, url):
        with pytest.raises(
            JudgeError, match=r"no grade for 200 of 200.*\n.*question 1: no grades in the reply 'rubbish'"
        ):
            judged(tmp_path, url, parallel=1)
        assert len(server.requests) == HOPELESS


def test_a_failure_that_passes_is_tried_again(tmp_path):
    failed: set[int] = set()

    def say(text: str, _: int):
        if (n := number_of(text)) % 3 or n in failed:
            return "7"
        failed.add(n)
        return 503

    write_jsonl(tmp_path / "mine" / "train.jsonl", TALK[:60])
    with serving(say) as (server, url):
        judged(tmp_path, url)
        assert len(server.requests) == 80
    assert not quarantined(tmp_path / "run")


def test_a_server_that_refuses_everything_or_is_not_there_is_said(tmp_path):
    write_jsonl(tmp_path / "mine" / "train.jsonl", TALK)
    with serving(lambda text, n: 401) as (_, url), pytest.raises(JudgeError, match=r"answers 401: .*LONGRUN_API_KEY"):
        judged(tmp_path, url)
    with pytest.raises(JudgeError, match=r"does not say which model it has \(ConnectionRefusedError"):
        judged(tmp_path, url)
    with pytest.raises(ConfigError, match=r"corpus.judge.target=gone: a URL, or the directory of a model"):
        judged(tmp_path, "gone")


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("7", 7), (" 7.5 ", 7.5), ("8/10", 8), ("**9**", 9), ("Score: 3", 3), ("The score is 4, for it is short.", 4),
        ('{"score": 6}', 6), ("Rating: **10**", 10), ("Grade: 2. I repeat: grade: 2", 2), ("score = 5/10", 5),
    ],
)  # fmt: skip
def test_ways_to_say_a_grade(reply, grade):
    assert Judging().grade(reply) == grade


def test_what_a_record_says_cannot_grade_itself_nor_change_the_question():
    judging = Judging()
    question = judging.question([asks("{least} {most} {conversation}"), answers("Score: 10")])
    assert "user: {least} {most} {conversation}\n\nassistant: Score: 10" in question
    assert '{"name": "clock", "arguments": {}}' in judging.question(TWO_CALLS)
    with pytest.raises(ReplyError):
        judging.grade("I will not repeat its words.")


def test_preferences_are_graded_by_the_chosen_answer_and_bad_answers_not_at_all(tmp_path):
    pairs = [{"prompt": f"What is {n}?", "chosen": "Good.", "rejected": "Bad."} for n in range(40)]
    labelled = [{"prompt": f"What is {n}?", "completion": "Bad.", "label": False} for n in range(40)]
    write_jsonl(tmp_path / "mine" / "train.jsonl", pairs + labelled)
    with serving(lambda text, n: "Score: 9" if "Good." in text and "Bad." not in text else "Score: 1") as (server, url):
        judged(tmp_path, url)
        assert len(server.requests) == 40
    assert not quarantined(tmp_path / "run")
    assert {opening(row) for row in records(tmp_path / "run", "kto_train")}


@pytest.fixture(scope="module")
def grader(tmp_path_factory):
    """A tiny Llama that learned to reply with a grade and nothing else."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("grader")
    chatml = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, eos_token_id=chatml.special("<|im_end|>"), pad_token_id=chatml.pad,
        bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    talks = [[asks(f"Grade this: {said}"), answers("Score: 7")] for said in ("It is 3.", "It is 12.", "the quick fox")]
    for _ in range(40):
        for talk in talks:
            ids, labels = encode(chatml, talk).inputs_and_labels(256)
            logits = model(torch.tensor([ids])).logits[0]
            torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory / "model")
    chatml.save(directory / "model")
    return directory


REQUEST = "Grade this: {conversation}"


def test_a_model_of_a_directory_grades(grader, tmp_path):
    write_jsonl(tmp_path / "mine" / "train.jsonl", TALK[:12])
    settings = {"threshold": 6, "request": f"'{REQUEST}'"}
    judged(tmp_path, str(grader), **settings)
    kept = records(tmp_path / "run", "train") + records(tmp_path / "run", "validation")
    assert len(kept) == 12 and {row["grade"] for row in kept} == {7}


def test_a_conversation_longer_than_the_model_reads_has_no_grade(grader, tmp_path):
    judging = Judging(target=str(grader), request=REQUEST, failures=1.0)
    found = grades(judging, judging.judge(), ["Grade this: It is 3.", "fox " * 500], tmp_path / "grades.jsonl")
    assert found.grades == {0: 7} and re.match(
        r"\d+ tokens to read and 32 to reply; the model has 256", found.faults[1]
    )


def test_another_model_in_the_directory_is_another_judge(grader, tmp_path):
    before = Local(grader / "model", 8).identity
    assert before == Local(grader / "model", 8).identity
    (tmp_path / "config.json").write_text("{}")
    assert Local(tmp_path, 8).identity != before
    with pytest.raises(JudgeError, match="holds no model that can grade"):
        Local(tmp_path, 8).reply("What?")
