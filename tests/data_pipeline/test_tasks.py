import itertools
import json

import pytest

from conf.errors import ConfigError
from data_pipeline.artifact import Artifact
from data_pipeline.corpus.tasks import Tasks
from data_pipeline.tasks import TASKS, TaskError, correct, exercises, unique
from tests.data_pipeline.chats import tokenizer

SMALL = Tasks(tasks=["parity", "compare"], train=60, validation=5, test=5, pairs=20, small_talk=10)


def solve(task: str, question: str) -> str:
    """The answer, worked out from the question's words."""
    numbers = [word.strip("?.,") for word in question.split() if word.strip("?.,").isdigit()]
    if task == "parity":
        return "odd" if int(numbers[0]) % 2 else "even"
    if task == "compare":
        return (max if "larger" in question else min)(numbers, key=int)
    if task == "largest":
        return max(numbers[0])
    if task == "sort":
        return "".join(sorted(numbers[0]))
    return numbers[0][::-1]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_answers_are_right_and_wrong_ones_are_wrong(task):
    for exercise in itertools.islice(exercises(task, 0), 300):
        assert exercise.answer == solve(task, exercise.question)
        assert not correct(exercise.wrong, exercise.answer)


@pytest.mark.parametrize("name", ["chain_sum", "spell_backward", "syllogism"])
def test_tasks_of_reasoning_gym_agree_with_its_own_scorer(name):
    import reasoning_gym

    gym = reasoning_gym.create_dataset(name, size=1, seed=0)
    entry = gym[0]
    assert gym.score_answer(entry["answer"], entry) == 1
    for exercise in itertools.islice(exercises(f"reasoning_gym.{name}", 0), 50):
        assert correct(exercise.answer, exercise.answer) and not correct(exercise.wrong, exercise.answer)
    assert unique(f"reasoning_gym.{name}", 3, 20) == unique(f"reasoning_gym.{name}", 3, 20)


def test_exercises_are_a_function_of_task_and_seed():
    assert unique("sort", 1, 50) == unique("sort", 1, 50) != unique("sort", 2, 50)


def test_a_task_that_has_too_few_questions_says_how_many():
    with pytest.raises(TaskError, match=r"Task reasoning_gym\.coin_flip has about \d+ different questions, 5000"):
        unique("reasoning_gym.coin_flip", 0, 5000)
    with pytest.raises(TaskError, match="There is no task 'sums'"):
        unique("sums", 0, 1)
    with pytest.raises(TaskError, match="reasoning-gym has no data set 'sums'"):
        unique("reasoning_gym.sums", 0, 1)


def test_no_question_is_in_two_splits():
    made = SMALL.made(0)
    asked = {
        split: {m["content"] for record in made[split] for m in record["messages"] if m["role"] == "user"}
        for split in ("train", "validation", "test")
    }
    for one, other in itertools.combinations(asked.values(), 2):
        assert not one & other
    prompts = {
        split: {r["prompt"][0]["content"] for r in made[f"preferences_{split}"]} for split in ("train", "validation")
    }
    assert prompts["train"] <= asked["train"] and prompts["validation"] == asked["validation"]


def test_every_record_answers_its_last_question_and_some_conversations_go_on():
    made = SMALL.made(0)
    for record in made["train"] + made["test"]:
        assert record["messages"][-1] == {"role": "assistant", "content": record["answer"]}
    turns = [len(record["messages"]) for record in made["train"]]
    assert set(turns) == {2, 4} and turns.count(2) > turns.count(4)
    assert {record["task"] for record in made["train"]} == {"parity", "compare", "small_talk"}
    assert {record["task"] for record in made["test"]} == {"parity", "compare"}


def test_records_are_a_function_of_settings_and_seed():
    assert SMALL.made(1) == SMALL.made(1) != SMALL.made(2)


@pytest.fixture
def make(tmp_path):
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from conf import entry
    from data_pipeline.config import PipelineConfig

    def run(**settings) -> int:
        overrides = ["corpus=tasks", f"run_dir={tmp_path / 'tasks'}"]
        overrides += ["corpus.train=20", "corpus.validation=2", "corpus.test=2", "corpus.pairs=5"]
        with initialize_config_module("conf", version_base="1.3"):
            node = compose("data_pipeline", overrides=overrides + [f"{k}={v}" for k, v in settings.items()])
        config = entry.typed(node, PipelineConfig)
        return config.corpus.run(config, OmegaConf.to_container(node, resolve=True))

    return run


def test_the_artifact_is_made_once_and_again_when_a_setting_changes(make, tmp_path, capsys):
    assert make() == 0
    first = Artifact.read(tmp_path / "tasks", kind="chat")
    first.verify()
    assert set(first.files) == {
        "corpus.html",
        *(f"{split}.jsonl" for split in ("train", "validation", "test")),
        *(f"preferences_{split}.jsonl" for split in ("train", "validation")),
    }
    assert make() == 0 and "nothing to do" in capsys.readouterr().out
    assert make(**{"corpus.train": 30}) == 0
    second = Artifact.read(tmp_path / "tasks")
    assert second.recipe != first.recipe and second.metrics["records"]["train"] > first.metrics["records"]["train"]


def test_what_is_made_can_be_trained_on(make, tmp_path):
    from data_pipeline.chat import ChatData
    from data_pipeline.preference import PreferenceData

    make()
    path = str(tmp_path / "tasks")
    assert len(ChatData(path, 128).open("train", tokenizer(), 0)) > 0
    assert len(PreferenceData(path, 128).open("train", tokenizer(), 0)) == 20
    record = json.loads((tmp_path / "tasks" / "preferences_validation.jsonl").read_text().splitlines()[0])
    assert set(record) == {"prompt", "chosen", "rejected", "task"}


def test_settings_that_cannot_work_are_problems(make):
    with pytest.raises(ConfigError) as caught:
        make(**{"corpus.tasks": "[sums,parity,parity]", "corpus.pairs": 50, "corpus.test": 0, "corpus.multi_turn": 1})
    assert [p.key for p in caught.value.problems] == [
        "corpus.tasks",
        "corpus.tasks",
        "corpus.test",
        "corpus.pairs",
        "corpus.multi_turn",
    ]
