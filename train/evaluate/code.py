"""pass@1 on programming tasks: the model goes on with a function, and tests judge what it wrote (Chen et al. 2021,
arXiv:2107.03374, section 2.1, at one greedy sample per task).

What a model writes is run in a sandbox. The tests share a process with it, as they do in human-eval: a program that
sets out to deceive them, not only to end early, could.
"""

import json
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.sandbox.run import Limits, run
from train.evaluate.errors import EvaluationError
from train.evaluate.load import Subject
from train.generate import Generator, Sampling

PASS = "pass@1"
KEYS = ("task_id", "prompt", "entry_point", "test")
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""What begins the next thing after a function (section 3.2)."""
LIMITS = Limits(wall_s=20.0)
SHOWN = 3
"""Programs in results.json."""


@dataclass(frozen=True)
class CodeTask:
    """One line of the file.

    Args:
        task_id: its name.
        prompt: the beginning of a function, up to its body.
        entry_point: the function's name.
        test: a program that defines `check(candidate)`.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str


@dataclass(frozen=True)
class CodeScore:
    """How a model did.

    Args:
        passed: share of tasks whose tests pass.
        n: number of tasks.
        stopped: tasks whose program was stopped at a limit.
        examples: the first tasks, each with what was written and how it ended.
    """

    passed: float
    n: int
    stopped: int
    examples: list[dict[str, str]]


def code_tasks(path: str, isolation: str) -> list[CodeTask]:
    """The tasks of a file, once it is known that their programs can be held here.

    Raises:
        EvaluationError: it cannot be read, or a line is no task; names the line and what it lacks.
        SandboxError: this machine cannot hold programs so.
    """
    run("", limits=LIMITS, isolation=isolation)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"eval.code={path} cannot be read: {error}") from error
    tasks, faults = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            faults.append(f"line {number} is not JSON: {error}")
            continue
        if record is None:
            continue
        lacking = [key for key in KEYS if not isinstance(record, dict) or not isinstance(record.get(key), str)]
        if lacking:
            faults.append(f"line {number} has no text for {', '.join(lacking)}")
        elif not record["entry_point"].isidentifier():
            faults.append(f"line {number}: entry_point {record['entry_point']!r} is no name of a function")
        else:
            tasks.append(CodeTask(*(record[key] for key in KEYS)))
    if faults or not tasks:
        told = "\n  ".join(faults) or "it is empty"
        raise EvaluationError(f"eval.code={path} holds no tasks in human-eval's form:\n  {told}")
    return tasks


def code_score(subject: Subject, tasks: Sequence[CodeTask], max_tokens: int, batch: int, isolation: str) -> CodeScore:
    """Let the model go on with each prompt, taking the likeliest token, and run what it wrote."""
    generator = Generator(subject.model, subject.tokenizer, batch)
    prompts = [subject.tokenizer.encode(task.prompt) for task in tasks]
    return judged(tasks, generator.complete(prompts, Sampling(max_tokens=max_tokens, stop=STOP)), isolation)


def judged(tasks: Sequence[CodeTask], written: Sequence[str], isolation: str) -> CodeScore:
    """Run the programs, as many at once as there are cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        ends = list(threads.map(lambda task, text: ended(task, text, isolation), tasks, written))
    return CodeScore(
        passed=ends.count("passed") / len(tasks),
        n=len(tasks),
        stopped=sum(end.startswith("stopped") for end in ends),
        examples=[
            {"task": task.task_id, "prompt": task.prompt, "answer": text, "end": end}
            for task, text, end in list(zip(tasks, written, ends, strict=True))[:SHOWN]
        ],
    )


def ended(task: CodeTask, text: str, isolation: str) -> str:
    """ "passed", "stopped: " and the limit, or "failed: " and the last line of the error.

    A program that ends with 0 before its tests have passed does not know the word that is said after them.
    """
    word = secrets.token_hex()
    program = f"{task.prompt}{text}\n{task.test}\ncheck({task.entry_point})\nprint({word!r})\n"
    outcome = run(program, limits=LIMITS, isolation=isolation)
    if outcome.stopped:
        return f"stopped: {outcome.stopped}"
    if outcome.code == 0 and outcome.stdout.endswith(f"{word}\n"):
        return "passed"
    return f"failed: {(outcome.stderr.strip() or 'it ended before its tests').splitlines()[-1]}"
