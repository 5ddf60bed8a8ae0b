"""pass@1: right and wrong programs, those that cheat and those that mean harm, and a model from end to end."""

import json
import shutil

import pytest

from conf.errors import LongrunError
from data_pipeline.artifact import Artifact
from tests.train.exports import stage, trained_run
from train.evaluate import code
from train.evaluate.code import CodeTask, code_tasks, judged
from train.evaluate.errors import EvaluationError

TASKS = [
    CodeTask(
        "local/0",
        'def add(a, b):\n    """The sum."""\n',
        "add",
        "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n",
    ),
    CodeTask(
        "local/1",
        'def first(words):\n    """The first word in the order of the alphabet."""\n',
        "first",
        "def check(candidate):\n    assert candidate(['b', 'a']) == 'a'\n",
    ),
]
ANY = CodeTask(
    "any", 'def one():\n    return 1\n"""', "one", '"""\ndef check(candidate):\n    assert candidate() == 1\n'
)
"""Passes whatever a model writes into its comment."""


def test_the_share_of_programs_that_pass_is_counted():
    score = judged(TASKS, ["    return a + b", "    return words[0]"], "namespaces")
    assert (score.passed, score.n, score.stopped) == (0.5, 2, 0)
    assert [example["end"] for example in score.examples] == ["passed", "failed: AssertionError"]


@pytest.mark.parametrize(
    ("written", "end"),
    [
        ("    return a +", "failed: SyntaxError"),
        ("    return a - b", "failed: AssertionError"),
        ("    pass\nimport sys\nsys.exit(0)", "failed: it ended before its tests"),
        ("    pass\nimport os\nos._exit(0)", "failed: it ended before its tests"),
        ("    pass\nprint('passed')\nraise SystemExit", "failed: it ended before its tests"),
        ("    import socket\n    return socket.create_connection(('127.0.0.1', 80))", "failed: PermissionError"),
        ("    while True: print('x' * 9999)", "stopped: output"),
    ],
)
def test_a_program_that_does_not_pass_its_tests_fails(written, end):
    assert code.ended(TASKS[0], written, "namespaces").startswith(end)


def write(file, tasks) -> None:
    file.write_text("".join(json.dumps(vars(task)) + "\n" for task in tasks))


def test_a_model_is_measured_and_the_gate_can_ask_for_it(tmp_path, monkeypatch):
    trained_run(tmp_path / "sft")
    write(tmp_path / "tasks.jsonl", [*TASKS, ANY, ANY])
    settings = {
        "stage": "evaluate",
        "init_from": str(tmp_path / "sft"),
        "eval.code": str(tmp_path / "tasks.jsonl"),
        "eval.code_tokens": "8",
        "eval.precision": "fp32",
        "run_dir": str(tmp_path / "run"),
        "+eval.gate.codes.metric": "pass@1",
        "+eval.gate.codes.min": "0.5",
    }
    stage(**settings)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["pass@1"] == results["models"]["sft"]["pass@1"] == 0.5 and results["gate"]["passed"]
    assert results["code"]["n"] == 4 and results["code"]["examples"][0]["task"] == "local/0"
    assert Artifact.read(tmp_path / "run").metrics["pass@1"] == 0.5

    moved = shutil.copy(tmp_path / "tasks.jsonl", tmp_path / "same.jsonl")
    monkeypatch.setattr("train.evaluate.standard.code_score", None)
    stage(**settings | {"eval.code": str(moved)})  # the same tasks: nothing is measured again
    write(tmp_path / "tasks.jsonl", TASKS)
    with pytest.raises(LongrunError, match="its configuration or inputs are others"):
        stage(**settings)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "it is empty"),
        ("{", "line 1 is not JSON"),
        ('{"task_id": "a", "prompt": "p"}', "line 1 has no text for entry_point, test"),
        (
            '{"task_id": "a", "prompt": "p", "entry_point": "f();g", "test": ""}',
            "line 1: entry_point 'f();g' is no name",
        ),
        ("[1]", "line 1 has no text for task_id, prompt, entry_point, test"),
    ],
)
def test_what_is_no_task_is_named_by_its_line(tmp_path, content, told):
    (tmp_path / "tasks.jsonl").write_text(content)
    with pytest.raises(EvaluationError) as caught:
        code_tasks(str(tmp_path / "tasks.jsonl"), "namespaces")
    assert told in str(caught.value)
