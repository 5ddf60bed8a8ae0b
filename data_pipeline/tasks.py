"""Verifiable exercises: a question, its only answer, and a wrong answer that looks right.

Every exercise is drawn by a seeded generator, so sets of any size are made without a download. Those of ours are short
enough for a demo's model; `reasoning_gym.NAME` draws from any data set of that library (Apache-2.0).
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from conf.errors import LongrunError


class TaskError(LongrunError):
    """A task does not exist, or cannot give as many different questions as were asked for."""


@dataclass(frozen=True)
class Exercise:
    """One question.

    Args:
        question: what the user asks.
        answer: the right answer.
        wrong: a plausible other one.
    """

    question: str
    answer: str
    wrong: str


def normalised(answer: str) -> str:
    """What of an answer counts when it is compared: case, spacing and a final full stop do not."""
    return " ".join(answer.split()).rstrip(".").casefold()


def correct(given: str, answer: str) -> bool:
    return normalised(given) == normalised(answer)


def parity(draw: random.Random) -> Exercise:
    number = draw.randrange(100, 10_000)
    words = ("even", "odd")
    return Exercise(f"Is {number} even or odd?", words[number % 2], words[1 - number % 2])


def compare(draw: random.Random) -> Exercise:
    numbers = draw.sample(range(10, 100), 2)
    word, best = draw.choice([("larger", max), ("smaller", min)])
    answer = best(numbers)
    return Exercise(f"Which number is {word}, {numbers[0]} or {numbers[1]}?", str(answer), str(sum(numbers) - answer))


def largest(draw: random.Random) -> Exercise:
    digits = draw.sample("0123456789", 5)
    answer, second = sorted(digits, reverse=True)[:2]
    return Exercise(f"What is the largest digit of {''.join(digits)}?", answer, second)


def sort(draw: random.Random) -> Exercise:
    digits = draw.sample("0123456789", 4)
    answer = sorted(digits)
    return Exercise(f"Sort the digits of {''.join(digits)}.", "".join(answer), _shuffled(answer, draw))


def reverse(draw: random.Random) -> Exercise:
    digits = draw.sample("0123456789", 4)
    answer = digits[::-1]
    return Exercise(f"Write {''.join(digits)} backwards.", "".join(answer), _shuffled(answer, draw))


def _shuffled(characters: list[str], draw: random.Random) -> str:
    """The same characters in another order; they must not all be equal."""
    other = list(characters)
    while other == characters:
        draw.shuffle(other)
    return "".join(other)


TASKS: dict[str, Callable[[random.Random], Exercise]] = {
    "parity": parity,
    "compare": compare,
    "largest": largest,
    "sort": sort,
    "reverse": reverse,
}
GYM = "reasoning_gym."


def exercises(task: str, seed: int) -> Iterator[Exercise]:
    """An endless stream of exercises, questions repeating; a pure function of its arguments.

    Args:
        task: one of `TASKS`, or "reasoning_gym." and the name of one of its data sets.
        seed: of the draws.

    Raises:
        TaskError: there is no such task.
    """
    draw = random.Random(f"{task} {seed}")
    if task.startswith(GYM):
        yield from _from_gym(task.removeprefix(GYM), draw)
    elif task in TASKS:
        while True:
            yield TASKS[task](draw)
    else:
        raise TaskError(
            f"There is no task {task!r}. There are {', '.join(TASKS)}, and {GYM}NAME, such as {GYM}chain_sum."
        )


GYM_SETTINGS = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}}
"""Settings under which a data set is easy enough for a demo's model; the others have the library's own."""


def _from_gym(name: str, draw: random.Random) -> Iterator[Exercise]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise TaskError(f"reasoning-gym has no data set {name!r}. It has {', '.join(sorted(DATASETS))}.")
    while True:
        batch = reasoning_gym.create_dataset(name, size=1000, seed=draw.randrange(2**31), **GYM_SETTINGS.get(name, {}))
        for entry in batch:
            answer = str(entry["answer"])
            yield Exercise(entry["question"], answer, _perturbed(answer, draw))


def _perturbed(answer: str, draw: random.Random) -> str:
    """A whole number a little off; else the same characters in another order, or one more of them."""
    if answer.lstrip("-").isdigit():
        return str(int(answer) + draw.choice([-10, -2, -1, 1, 2, 10]))
    characters = list(answer)
    draw.shuffle(characters)
    wrong = "".join(characters)
    return wrong if not correct(wrong, answer) else answer + answer[-1:]


def unique(task: str, seed: int, number: int) -> list[Exercise]:
    """Exercises whose questions all differ, in the order in which they are drawn.

    Raises:
        TaskError: the task does not have so many.
    """
    found: dict[str, Exercise] = {}
    barren = 0
    for exercise in exercises(task, seed):
        barren = 0 if exercise.question not in found else barren + 1
        found.setdefault(exercise.question, exercise)
        if len(found) >= number:
            return list(found.values())
        if barren > 100 * (len(found) + 10):
            raise TaskError(
                f"Task {task} has about {len(found)} different questions, {number} were asked for; "
                "lower corpus.train, corpus.validation or corpus.test."
            )
    raise AssertionError("the stream is endless")
