"""stage=evaluate end to end on tiny models, and its parts by hand."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conf.errors import ConfigError
from data_pipeline.artifact import Artifact, Draft
from data_pipeline.corpus.tasks import Tasks
from data_pipeline.preference import PreferenceData
from data_pipeline.records import RecordError
from data_pipeline.tokenizer import Tokenizer
from parallel.engine import Outputs
from tests.data_pipeline.chats import write_jsonl
from tests.train.exports import TINY, stage, trained_run
from train.evaluate.answers import accuracy, questions
from train.evaluate.errors import EvaluationError
from train.evaluate.gate import Check, check_names, check_problems, judge
from train.evaluate.harness import benchmark
from train.evaluate.load import Subject
from train.evaluate.preferences import preference_scores, sequence_logprobs
from train.evaluate.text import held_out, score_text
from train.metrics.jsonl import read as read_lines
from train.objectives.dpo import DPO

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def life(tmp_path_factory, corpus: Path) -> Path:
    """A corpus, tasks, and three models that share its tokenizer."""
    root = tmp_path_factory.mktemp("life")
    tasks = Tasks(tasks=["parity", "sort"], train=20, validation=4, test=3, pairs=8)
    for stem, records in tasks.made(0).items():
        write_jsonl(root / "tasks" / f"{stem}.jsonl", records)
    Draft(root / "tasks", "chat", {}, {}).publish("*.jsonl")
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    for seed, name in enumerate(("pretrain", "sft", "dpo")):
        trained_run(root / name, tokenizer=tokenizer, kind=name, seed=seed)
    return root


def evaluated(life: Path, corpus: Path, run_dir: Path, **settings: str) -> dict:
    stage(
        **{
            "stage": "evaluate",
            "init_from": str(life / "dpo"),
            "eval.text": str(corpus),
            "eval.tasks": str(life / "tasks"),
            "eval.baselines": f"[{life / 'pretrain'},{life / 'sft'}]",
            "eval.reference": str(life / "sft"),
            "eval.text_bytes": "6000",
            "eval.sequence_length": "128",
            "eval.max_tokens": "4",
            "eval.precision": "fp32",
            "run_dir": str(run_dir),
            **settings,
        }
    )
    return json.loads((run_dir / "results.json").read_text())


def test_a_model_and_its_ancestors_are_measured_and_compared(life, corpus, tmp_path):
    results = evaluated(
        life, corpus, tmp_path / "run", **{"+eval.gate.worse.metric": "perplexity", "+eval.gate.worse.max": "1"}
    )
    assert list(results["models"]) == ["pretrain", "sft", "dpo"] and results["model"] == "dpo"
    own = results["models"]["dpo"]
    assert own["perplexity"] == results["perplexity"] > 1 and own["bits_per_byte"] == results["bits_per_byte"]
    assert set(results["tasks"]) == {"parity", "sort"} and results["tasks"]["sort"]["n"] == 3
    assert results["models"]["sft"]["preference_margin"] == 0, "the reference differs from itself by nothing"
    assert own["preference_margin"] != 0
    sample = results["samples"][0]
    assert set(sample["answers"]) == {"pretrain", "sft", "dpo"} and sample["expected"] in ("even", "odd")
    artifact = Artifact.read(tmp_path / "run", kind="evaluation")
    assert artifact.inputs["model"]["id"] == Artifact.read(life / "dpo").id
    assert artifact.metrics["gate"] is False, "a failed gate is written down, not lost"
    (alert,) = read_lines(tmp_path / "run" / "alerts.jsonl")
    assert alert["kind"] == "gate" and "perplexity" in alert["text"] and "at most 1 was asked for" in alert["text"]
    assert results["gate"]["checks"][0]["threshold"] == "at most 1"
    assert sample["prompt"] in (tmp_path / "run" / "samples.txt").read_text()
    artifact.verify()


def test_a_baseline_called_model_is_not_taken_for_the_judged_one(life, corpus, tmp_path):
    baseline = shutil.copytree(life / "pretrain", tmp_path / "model")
    evaluated(life, corpus, tmp_path / "evaluate", **{"eval.baselines": f"[{baseline}]", "eval.tasks": ""})
    artifact = Artifact.read(tmp_path / "evaluate")
    assert artifact.inputs["model"]["id"] == Artifact.read(life / "dpo").id
    assert artifact.inputs["baseline model"]["id"] == Artifact.read(baseline).id


def test_the_same_evaluation_is_not_made_again(life, corpus, tmp_path, capsys):
    evaluated(life, corpus, tmp_path / "run", **{"eval.tasks": ""})
    before = (tmp_path / "run" / "manifest.json").stat().st_mtime_ns
    evaluated(life, corpus, tmp_path / "run", **{"eval.tasks": ""})
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "run" / "manifest.json").stat().st_mtime_ns == before


def test_without_a_gate_results_say_so(life, corpus, tmp_path):
    assert evaluated(life, corpus, tmp_path / "run", **{"eval.tasks": ""})["gate"] is None


def test_a_misspelt_metric_is_refused_with_the_nearest_before_any_model_is_asked(life, corpus, tmp_path):
    gate = {"+eval.gate.right.metric": "acuracy/sort", "+eval.gate.b.metric": "accuracy@base"}
    gate |= {"+eval.gate.right.min": "0.5", "+eval.gate.b.min": "0"}
    with pytest.raises(ConfigError) as caught:
        evaluated(life, corpus, tmp_path / "run", **gate)
    message = str(caught.value)
    assert "eval.gate.right.metric=acuracy/sort: did you mean accuracy/sort? measured are perplexity" in message
    assert "eval.gate.b.metric=accuracy@base" in message and "accuracy@pretrain" in message
    assert not (tmp_path / "run" / "results.json").exists()


def test_what_is_missing_is_said_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError) as caught:
        stage(**{"stage": "evaluate", "eval.batch": "0", "run_dir": str(tmp_path), "+eval.gate.x.metric": "accuracy"})
    assert {problem.key for problem in caught.value.problems} >= {"init_from", "eval.text", "eval.batch", "eval.gate.x"}


def test_models_of_the_same_name_are_refused(life, corpus, tmp_path):
    with pytest.raises(ConfigError, match="directories with different names"):
        evaluated(life, corpus, tmp_path / "run", **{"eval.baselines": f"[{life / 'dpo'}]"})


def test_perplexity_and_bits_are_those_of_one_document_at_a_time(life, corpus):
    subject = Subject.load(str(life / "dpo"), CPU, torch.float32)
    tokenizer = subject.tokenizer
    texts = held_out(corpus, "test", 5000)
    nats, predicted = 0.0, 0
    for text in texts:
        tokens_L = torch.tensor([*tokenizer.encode(text), tokenizer.eos])
        for begin in range(0, len(tokens_L) - 1, 64):
            piece_L = tokens_L[begin : begin + 65]
            zeros_BL = torch.zeros_like(piece_L[:-1]).unsqueeze(0)
            with torch.no_grad():
                logits_BLV = subject.model(piece_L[:-1].unsqueeze(0), torch.arange(len(piece_L) - 1)[None], zeros_BL)
            nats += torch.nn.functional.cross_entropy(logits_BLV[0], piece_L[1:], reduction="sum").item()
            predicted += len(piece_L) - 1
    score = score_text(subject, texts, 64, batch=3)
    assert score.bytes == sum(len(text.encode()) for text in texts) >= 5000
    assert predicted == score.tokens - len(texts)
    assert score.perplexity == pytest.approx(math.exp(nats / predicted), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(nats / predicted * score.tokens / score.bytes / math.log(2), rel=1e-4)


def test_a_model_that_knows_nothing_needs_the_bits_of_a_uniform_guess(life, corpus):
    subject = Subject.load(str(life / "dpo"), CPU, torch.float32)
    for parameter in subject.model.parameters():
        parameter.data.zero_()
    texts = held_out(corpus, "test", 3000)
    score = score_text(subject, texts, 64, batch=8)
    assert score.perplexity == pytest.approx(subject.tokenizer.vocabulary, rel=1e-4)
    assert score.bits_per_byte == pytest.approx(
        math.log2(subject.tokenizer.vocabulary) * score.tokens / score.bytes, rel=1e-4
    )


def test_held_out_text_is_the_same_every_time_whole_and_within_its_split(corpus):
    some, everything = held_out(corpus, "test", 5000), held_out(corpus, "test", 0)
    assert some == everything[: len(some)] and len(some) < len(everything)
    split = Artifact.read(corpus).metrics["splits"]["test"]
    assert len(everything) == split["documents"] and sum(len(t.encode()) for t in everything) == split["bytes"]


def test_padding_and_batching_change_no_score(life):
    subject = Subject.load(str(life / "dpo"), CPU, torch.float32)
    pairs = PreferenceData(str(life / "tasks")).open("validation", subject.tokenizer, 0)
    torch.testing.assert_close(sequence_logprobs(subject, pairs, 8), sequence_logprobs(subject, pairs, 3))


def test_the_margin_is_that_of_dpo_at_beta_one(life, tmp_path):
    policy, reference = (Subject.load(str(life / name), CPU, torch.float32) for name in ("dpo", "sft"))
    pairs = PreferenceData(str(life / "tasks")).open("validation", policy.tokenizer, 0)

    class AsEngine:
        device, dp_rank, dp_size = CPU, 0, 1

        def logprobs(self, batch) -> Tensor:
            return reference.logprobs(batch)

    objective = DPO(beta=1.0)
    batch = objective.setup(AsEngine(), pairs, tmp_path).micro_batch(range(len(pairs)))
    terms = objective.loss(Outputs(policy.logprobs(batch)), batch)
    found = preference_scores(sequence_logprobs(policy, pairs, 4), sequence_logprobs(reference, pairs, 4))
    assert found["margin"] == pytest.approx(float(terms.metrics["margin"]) / len(pairs), rel=1e-4)
    assert found["accuracy"] == pytest.approx(float(terms.metrics["accuracy"]) / len(pairs))


def test_accuracy_is_per_task_and_forgives_case_space_and_full_stop(life):
    asked = questions(str(life / "tasks"), "test", 0)
    given = [f"  {question.answer.upper()}. " if question.task == "parity" else "x" for question in asked]
    assert accuracy(asked, given) == {"parity": {"accuracy": 1.0, "n": 3}, "sort": {"accuracy": 0.0, "n": 3}}
    assert len(questions(str(life / "tasks"), "test", 2)) == 4


def test_test_records_must_say_task_and_answer(tmp_path):
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "fox"}]
    write_jsonl(tmp_path / "test.jsonl", [{"messages": messages, "task": "t", "answer": "fox"}, {"messages": messages}])
    with pytest.raises(RecordError, match=r"test\.jsonl:2: task is None; expected text"):
        questions(str(tmp_path), "test", 0)


def test_a_gate_passes_when_every_check_does():
    gate = {"right": Check("accuracy", min=0.5), "taught": Check("accuracy", "accuracy@base", min=0.2, max=0.9)}
    passed = judge(gate, {"accuracy": 0.5, "accuracy@base": 0.3})
    assert passed is not None and passed["passed"]
    assert passed["checks"][1]["metric"] == "accuracy - accuracy@base"
    assert passed["checks"][1]["threshold"] == "at least 0.2 and at most 0.9"
    failed = judge(gate, {"accuracy": 0.5, "accuracy@base": 0.4})
    assert failed is not None and not failed["passed"]
    assert [check["passed"] for check in failed["checks"]] == [True, False]
    assert judge({}, {}) is None


def test_a_figure_that_is_no_number_passes_nothing():
    for check in (Check("perplexity", max=10), Check("perplexity", min=10), Check("absent", max=1)):
        assert not judge({"c": check}, {"perplexity": math.nan})["passed"]


def test_a_check_without_bound_or_metric_or_with_other_keys_is_a_problem():
    gate = {"a": {"metric": "accuracy"}, "b": {"min": 1}, "c": {"metric": "accuracy", "least": 1}, "d": 3}
    problems = check_problems(gate | {"e": {"metric": "accuracy", "min": "high"}})
    keys = [problem.key for problem in problems]
    assert keys == ["eval.gate.a", "eval.gate.b.metric", "eval.gate.c", "eval.gate.d", "eval.gate.e"]
    assert "keys of a check are max, metric, min, minus" in str(problems[2])


def test_figures_of_benchmarks_may_be_asked_for_though_their_names_come_later():
    check_names({"g": Check("benchmark/arc/acc", min=0.2)}, ["accuracy"], ["arc"])
    with pytest.raises(ConfigError, match=r"eval\.gate\.g\.metric"):
        check_names({"g": Check("benchmark/arc/acc", min=0.2)}, ["accuracy"], ["other"])


def test_without_lm_eval_benchmarks_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"pip install 'longrun\[eval\]'"):
        benchmark(Path("model"), ["arc_easy"], "", 8, "cpu")


@pytest.mark.slow
def test_benchmarks_run_on_tasks_of_ones_own(life, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_jsonl(tmp_path / "toy.jsonl", [{"ask": f"Is {n} even or odd?", "odd": n % 2} for n in range(4)])
    (tmp_path / "toy.yaml").write_text(
        "task: toy\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'toy.jsonl'}}}}}\n"
        "doc_to_text: '{{ask}}'\ndoc_to_choice: [even, odd]\ndoc_to_target: '{{odd}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    found = benchmark(life / "dpo" / "model", ["toy"], str(tmp_path), 4, "cpu")
    assert 0 <= found["toy"]["acc"] <= 1
    with pytest.raises(EvaluationError, match="lm-eval has no task toys"):
        benchmark(life / "dpo" / "model", ["toys"], str(tmp_path), 4, "cpu")


def test_tiny_models_are_loaded_as_they_were_written(life):
    subject = Subject.load(str(life / "sft"), CPU, torch.float32)
    assert subject.name == "sft" and subject.source.config == TINY and not subject.model.training
