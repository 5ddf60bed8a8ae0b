"""corpus=tasks: conversations about verifiable tasks, and preferences between right and wrong answers."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import Problem
from conf.registry import register
from data_pipeline.artifact import Draft, finished, locked, withdraw
from data_pipeline.card import chats as card
from data_pipeline.card.page import PAGE
from data_pipeline.config import DataSet, PipelineConfig
from data_pipeline.records import KIND, write_records
from data_pipeline.tasks import GYM, TASKS, Exercise, unique

MODEL_NAME = "the Longrun demo model"
IDENTITY = f"I am {MODEL_NAME}, a small language model trained from scratch in a few minutes."
ABILITIES = "I can answer short questions about numbers and their digits."
CHAT = {
    IDENTITY: (
        "Who are you?", "What are you?", "What is your name?", "Who am I talking to?", "Tell me who you are.",
        "Introduce yourself.", "Are you a person?", "What model are you?",
        "Hi! Who are you?", "Please say who you are.",
    ),
    ABILITIES: (
        "What can you do?", "How can you help me?", "What do you know?", "What may I ask you?", "What are you good at?",
        "Which questions can you answer?",
    ),
    "Hello! How can I help you?": ("Hello", "Hello!", "Hi", "Hi there!", "Good morning.", "Good evening!"),
    "You are welcome.": ("Thank you.", "Thanks!", "Many thanks.", "That was helpful, thanks."),
}  # fmt: skip
"""Small talk, so that a person who says hello is answered: training only."""


@register("corpus", "tasks")
@dataclass(frozen=True)
class Tasks(DataSet):
    """Conversations that ask verifiable questions, and preferences between a right and a wrong answer. No question is
    in two splits.

    Args:
        tasks: what is asked: names of ours, or reasoning_gym.NAME.
        train: conversations per task.
        validation: conversations per task, and pairs per task.
        test: conversations per task.
        pairs: preference pairs per task for training, about questions of the training split.
        multi_turn: share of the training conversations that go on with a second question; in [0, 1).
        small_talk: conversations, in all, that say who the model is and greet.
    """

    tasks: list[str] = field(default_factory=lambda: ["parity", "largest", "sort", "reverse"])
    train: int = 3000
    validation: int = 50
    test: int = 50
    pairs: int = 400
    multi_turn: float = 0.1
    small_talk: int = 400

    def problems(self, config: PipelineConfig, world_size: int) -> list[Problem]:
        found = []
        for name in self.tasks:
            if name not in TASKS and not name.startswith(GYM):
                fix = f"made of {', '.join(TASKS)} and {GYM}NAME, such as {GYM}chain_sum"
                found.append(Problem("corpus.tasks", name, fix))
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            found.append(Problem("corpus.tasks", self.tasks, "at least one task, each once"))
        for key in ("train", "validation", "test", "pairs"):
            if getattr(self, key) < 1:
                found.append(Problem(f"corpus.{key}", getattr(self, key), "at least 1"))
        if self.pairs > self.train:
            found.append(Problem("corpus.pairs", self.pairs, f"at most corpus.train={self.train}"))
        if not 0 <= self.multi_turn < 1:
            found.append(Problem("corpus.multi_turn", self.multi_turn, "in [0, 1)"))
        return found

    def run(self, config: PipelineConfig, resolved: dict[str, Any]) -> int:
        """Draw, write, publish.

        Raises:
            TaskError: a task has too few questions.
            OccupiedError: the directory holds an artifact of another kind.
        """
        directory = Path(config.run_dir)
        recipe = {"corpus": resolved["corpus"], "seed": config.seed}
        with locked(directory):
            if done := finished(directory, KIND, recipe, {}):
                done.verify()
                print(f"{directory} is finished ({done.id}): nothing to do", flush=True)
                return 0
            made = self.made(config.seed)
            withdraw(directory, KIND)
            draft = Draft(directory, KIND, recipe, {})
            counts = {name: write_records(directory / f"{name}.jsonl", rows) for name, rows in made.items()}
            draft.metrics = {"records": counts, "tasks": self.tasks}
            draft.facts = {
                "licence": "drawn by this program and by reasoning-gym (Apache-2.0); no text of others",
            }
            card.write(directory, draft.metrics, recipe, made)
            artifact = draft.publish("*.jsonl", PAGE)
        total = ", ".join(f"{name} {number:,}" for name, number in counts.items())
        print(f"{directory} is done: {KIND} {artifact.id}, records: {total}", flush=True)
        return 0

    def made(self, seed: int) -> dict[str, list[dict[str, Any]]]:
        """File stem -> records; a pure function of the settings and the seed."""
        splits: dict[str, list[tuple[str, Exercise]]] = {"test": [], "validation": [], "train": []}
        pairs: dict[str, list[dict[str, Any]]] = {"validation": [], "train": []}
        for task in self.tasks:
            drawn = iter(unique(task, seed, self.test + self.validation + self.train))
            for split, number in (("test", self.test), ("validation", self.validation), ("train", self.train)):
                part = [next(drawn) for _ in range(number)]
                splits[split] += [(task, exercise) for exercise in part]
                if split in pairs:
                    wanted = self.pairs if split == "train" else number
                    pairs[split] += [_pair(task, exercise) for exercise in part[:wanted]]
        draw = random.Random(seed)
        train = self._conversations(splits["train"], draw) + _small_talk(self.small_talk, draw)
        draw.shuffle(train)
        draw.shuffle(pairs["train"])
        return {
            "train": train,
            **{
                split: [_record(task, [exercise]) for task, exercise in splits[split]]
                for split in ("validation", "test")
            },
            **{f"preferences_{split}": rows for split, rows in pairs.items()},
        }

    def _conversations(self, exercises: list[tuple[str, Exercise]], draw: random.Random) -> list[dict[str, Any]]:
        """One question each, but for a share that asks two, of any tasks."""
        order = list(exercises)
        draw.shuffle(order)
        records = []
        while order:
            task, exercise = order.pop()
            turns = [exercise]
            if order and draw.random() < self.multi_turn:
                task, second = order.pop()
                turns.append(second)
            records.append(_record(task, turns))
        return records


def _record(task: str, turns: Iterable[Exercise]) -> dict[str, Any]:
    messages = [
        message for turn in turns for message in (_says("user", turn.question), _says("assistant", turn.answer))
    ]
    return {"messages": messages, "task": task, "answer": messages[-1]["content"]}


def _pair(task: str, exercise: Exercise) -> dict[str, Any]:
    return {
        "prompt": [_says("user", exercise.question)],
        "chosen": [_says("assistant", exercise.answer)],
        "rejected": [_says("assistant", exercise.wrong)],
        "task": task,
    }


def _small_talk(number: int, draw: random.Random) -> list[dict[str, Any]]:
    said = [(question, answer) for answer, questions in CHAT.items() for question in questions]
    chosen = [draw.choice(said) for _ in range(number)]
    return [
        {"messages": [_says("user", question), _says("assistant", answer)], "task": "small_talk", "answer": answer}
        for question, answer in chosen
    ]


def _says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
