"""Accuracy on held-out tasks: the model is asked, and its answer compared with the right one."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline import chat
from data_pipeline.records import read_records
from data_pipeline.tasks import correct
from train.evaluate.load import Subject
from train.export.source import end_of_turn
from train.generate import Generator, Sampling


@dataclass(frozen=True)
class Question:
    """One held-out record.

    Args:
        task: the task it belongs to.
        messages: the conversation up to the turn that is asked for.
        answer: the right answer.
    """

    task: str
    messages: list[chat.Message]
    answer: str


def questions(path: str, split: str, per_task: int) -> list[Question]:
    """The first records of every task.

    Args:
        path: chat artifact.
        split: its split.
        per_task: most questions per task; 0 takes all.

    Raises:
        RecordError: lists every record of a wrong shape.
        EmptySetError: there are none.
    """
    taken: dict[str, int] = defaultdict(int)
    found = []
    for record in read_records(path, split, _faults):
        task = record["task"]
        if per_task and taken[task] >= per_task:
            continue
        taken[task] += 1
        asked = max(i for i, message in enumerate(record["messages"]) if message["role"] == "assistant")
        found.append(Question(task, record["messages"][:asked], record["answer"]))
    return found


def _faults(record: Any) -> list[str]:
    faults = chat.chat_faults(record)
    if not faults:
        faults = [
            f"{key} is {record.get(key)!r}; expected text"
            for key in ("task", "answer")
            if not isinstance(record.get(key), str) or not record[key]
        ]
    return faults


def answers(subject: Subject, asked: Sequence[Question], max_tokens: int, batch: int) -> list[str]:
    """What the model says to each question, taking the likeliest token every time.

    Raises:
        TemplateError: the model's tokenizer has no chat template, or it fails on a conversation.
    """
    end = end_of_turn(subject.tokenizer)
    stop = () if end is None else (str(subject.tokenizer.backend.id_to_token(end)),)
    prompts = [chat.prompt(subject.tokenizer, question.messages) for question in asked]
    generator = Generator(subject.model, subject.tokenizer, batch)
    return [text.strip() for text in generator.complete(prompts, Sampling(max_tokens=max_tokens, stop=stop))]


def accuracy(asked: Sequence[Question], given: Sequence[str]) -> dict[str, dict[str, float]]:
    """Task -> {"accuracy": share of right answers, "n": number of questions}."""
    right: dict[str, list[bool]] = defaultdict(list)
    for question, answer in zip(asked, given, strict=True):
        right[question.task].append(correct(answer, question.answer))
    return {task: {"accuracy": sum(marks) / len(marks), "n": len(marks)} for task, marks in right.items()}
