"""What is measured of a model, of the models it came from, and how they are compared."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from conf.errors import Problem
from conf.registry import register
from data_pipeline.artifact import Artifact
from data_pipeline.preference import PreferenceData
from data_pipeline.sandbox.run import ISOLATIONS
from parallel.precision import PRECISIONS, compute_dtype
from train.evaluate.answers import Question, accuracy, answers, questions
from train.evaluate.code import PASS, CodeScore, CodeTask, code_score, code_tasks
from train.evaluate.gate import Check, check_names, check_problems, judge
from train.evaluate.harness import benchmark
from train.evaluate.load import Subject, name_of
from train.evaluate.preferences import preference_scores, sequence_logprobs
from train.evaluate.text import TextScore, held_out, score_text
from train.models import hf


@register("eval", "evaluation")
@dataclass(frozen=True)
class Standard:
    """Perplexity and bits per byte of held-out text, accuracy on held-out tasks, margins of held-out preferences, and
    the gate.

    Args:
        text: corpus artifact whose test split is read; empty measures no text.
        tasks: chat artifact whose test questions are asked and whose validation preferences are compared; empty
            measures neither.
        baselines: further models that are measured alike, for comparison: training runs, exports or Hugging Face
            directories. Their names are those of their directories.
        reference: model that preferences are compared with, as DPO does; empty compares plain log-probabilities.
        code: programming tasks, one JSON object per line with human-eval's keys (task_id, prompt, entry_point, test);
            what the model writes is run in a sandbox. Empty for none.
        benchmarks: tasks of lm-eval (extra `eval`), run on the model alone.
        benchmark_tasks: directory of lm-eval tasks of one's own, as YAML; empty for none.
        text_bytes: held-out text that is read, in bytes, whole documents; 0 reads all.
        questions: most questions per task; 0 asks all.
        sequence_length: context for text and preferences, in tokens.
        max_tokens: most new tokens per answer.
        code_tokens: most new tokens per program.
        isolation: what holds programs: "namespaces", or "landlock" where the machine allows none.
        batch: sequences at a time; bounds memory, changes no result.
        precision: "auto" is bf16 where the device has it natively, else fp32; "bf16"; "fp32".
        samples: questions per task whose answers are shown.
        gate: the checks that must hold before the model is handed on, by name, each {metric, minus, min, max} (see
            `train.evaluate.gate.Check`); none means there is no gate.
    """

    text: str = ""
    tasks: str = ""
    baselines: list[str] = field(default_factory=list)
    reference: str = ""
    code: str = ""
    benchmarks: list[str] = field(default_factory=list)
    benchmark_tasks: str = ""
    text_bytes: int = 200_000
    questions: int = 0
    sequence_length: int = 512
    max_tokens: int = 32
    code_tokens: int = 512
    isolation: str = "namespaces"
    batch: int = 32
    precision: str = "auto"
    samples: int = 2
    gate: dict[str, Any] = field(default_factory=dict)

    def problems(self, config: Any, world_size: int) -> list[Problem]:
        found = check_problems(self.gate)
        for key in ("sequence_length", "max_tokens", "code_tokens", "batch"):
            if getattr(self, key) < 1:
                found.append(Problem(f"eval.{key}", getattr(self, key), "at least 1"))
        for key in ("text_bytes", "questions", "samples"):
            if getattr(self, key) < 0:
                found.append(Problem(f"eval.{key}", getattr(self, key), "at least 0"))
        if self.precision not in PRECISIONS:
            found.append(Problem("eval.precision", self.precision, f"one of {', '.join(PRECISIONS)}"))
        if self.isolation not in ISOLATIONS:
            found.append(Problem("eval.isolation", self.isolation, f"one of {', '.join(ISOLATIONS)}"))
        if not (self.text or self.tasks or self.code or self.benchmarks):
            fix = "a corpus; or give eval.tasks a chat artifact, eval.code a file, or eval.benchmarks names: nothing "
            fix += "would be measured"
            found.append(Problem("eval.text", "''", fix))
        names = [name_of(path) for path in [*self.baselines, config.init_from]]
        if len(set(names)) < len(names):
            found.append(Problem("eval.baselines", self.baselines, f"directories with different names, not {names}"))
        return found

    def inputs(self) -> dict[str, Artifact]:
        """The data that are read.

        Raises:
            ArtifactError: one is not there, not finished, or of another kind.
        """
        kinds = {"text": "corpus", "tasks": "chat"}
        return {key: Artifact.read(getattr(self, key), kind) for key, kind in kinds.items() if getattr(self, key)}

    def measure(self, model: str, device: torch.device) -> dict[str, Any]:
        """Everything that goes into results.json.

        Args:
            model: path of the model that is judged.
            device: where it is run.

        Raises:
            ConfigError: the gate asks for figures that are not measured.
            LongrunError: models or data cannot be read, or programs cannot be held on this machine.
        """
        dtype = compute_dtype(self.precision, device)
        paths = [*self.baselines, model]
        asked = questions(self.tasks, "test", self.questions) if self.tasks else []
        programs = code_tasks(self.code, self.isolation) if self.code else []
        gate = {name: Check(**settings) for name, settings in self.gate.items()}
        check_names(gate, self._figure_names([name_of(path) for path in paths], asked), self.benchmarks)
        texts = held_out(self.text, "test", self.text_bytes) if self.text else []
        reference_2S = torch.zeros(())
        if self.reference and self._compares:
            reference_2S = self._preference_logprobs(Subject.load(self.reference, device, dtype))
        measured = [
            self._measured(Subject.load(path, device, dtype), texts, asked, programs, reference_2S) for path in paths
        ]
        judged = measured[-1]
        if self.benchmarks:
            judged.benchmarks = benchmark(
                hf.model_directory(model), self.benchmarks, self.benchmark_tasks, self.batch, str(device)
            )
        figures = judged.figures | {f"{key}@{m.name}": value for m in measured for key, value in m.figures.items()}
        return {
            "model": judged.name,
            **judged.details(asked, self.samples),
            "models": {m.name: m.figures for m in measured},
            "samples": [
                {
                    "task": asked[i].task,
                    "prompt": asked[i].messages[-1]["content"],
                    "expected": asked[i].answer,
                    "answers": {m.name: m.given[i] for m in measured},
                }
                for i in shown(asked, self.samples)
            ],
            "gate": judge(gate, figures),
        }

    @property
    def _compares(self) -> bool:
        return bool(self.tasks) and (Path(self.tasks) / "preferences_validation.jsonl").exists()

    def _preference_logprobs(self, subject: Subject) -> Tensor:
        data = PreferenceData(self.tasks, self.sequence_length, "truncate")
        return sequence_logprobs(subject, data.open("validation", subject.tokenizer, 0), self.batch)

    def _measured(
        self,
        subject: Subject,
        texts: list[str],
        asked: list[Question],
        programs: list[CodeTask],
        reference_2S: Tensor,
    ) -> "Measured":
        found = Measured(subject.name)
        if texts:
            found.text = score_text(subject, texts, self.sequence_length, self.batch)
        if asked:
            found.given = answers(subject, asked, self.max_tokens, self.batch)
            found.tasks = accuracy(asked, found.given)
        if programs:
            found.code = code_score(subject, programs, self.code_tokens, self.batch, self.isolation)
        if self._compares:
            found.preferences = preference_scores(self._preference_logprobs(subject), reference_2S)
        print(f"{found.name}: " + "  ".join(f"{key} {value:.4g}" for key, value in found.figures.items()), flush=True)
        return found

    def _figure_names(self, models: list[str], asked: list[Question]) -> list[str]:
        names = ["perplexity", "bits_per_byte"] if self.text else []
        if asked:
            names += ["accuracy", *(f"accuracy/{task}" for task in dict.fromkeys(question.task for question in asked))]
        if self.code:
            names.append(PASS)
        if self._compares:
            names += ["preference_margin", "preference_accuracy"]
        return names + [f"{name}@{model}" for model in models for name in names]


@dataclass
class Measured:
    """All that was found out about one model.

    Args:
        name: of the model.
        text: its score on text.
        tasks: task -> {"accuracy", "n"}.
        given: its answers, in the order of the questions.
        code: its score on programming tasks.
        preferences: its score on preferences.
        benchmarks: task -> figure -> value.
    """

    name: str
    text: TextScore | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)
    code: CodeScore | None = None
    preferences: dict[str, float] = field(default_factory=dict)
    benchmarks: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        """The figures by the names that a gate uses. `accuracy` is the mean over tasks."""
        found: dict[str, float] = {}
        if self.text:
            found |= {"perplexity": self.text.perplexity, "bits_per_byte": self.text.bits_per_byte}
        if self.tasks:
            found["accuracy"] = fmean(score["accuracy"] for score in self.tasks.values())
            found |= {f"accuracy/{task}": score["accuracy"] for task, score in self.tasks.items()}
        if self.code:
            found[PASS] = self.code.passed
        if self.preferences:
            found |= {f"preference_{key}": self.preferences[key] for key in ("margin", "accuracy")}
        for task, scores in self.benchmarks.items():
            found |= {f"benchmark/{task}/{figure}": value for figure, value in scores.items()}
        return found

    def details(self, asked: list[Question], examples: int) -> dict[str, Any]:
        """For results.json."""
        found: dict[str, Any] = {
            key: value
            for key, value in self.figures.items()
            if key in ("perplexity", "bits_per_byte", "accuracy", PASS)
        }
        if self.text:
            found["text"] = asdict(self.text)
        if self.tasks:
            found["tasks"] = {task: {**score, "examples": []} for task, score in self.tasks.items()}
            for i in shown(asked, examples):
                example = {
                    "prompt": asked[i].messages[-1]["content"],
                    "expected": asked[i].answer,
                    "answer": self.given[i],
                }
                found["tasks"][asked[i].task]["examples"].append(example)
        if self.code:
            found["code"] = asdict(self.code)
        if self.preferences:
            found["preferences"] = self.preferences
        if self.benchmarks:
            found["benchmarks"] = self.benchmarks
        return found


def shown(asked: list[Question], per_task: int) -> list[int]:
    """Which questions serve as examples: the first of every task."""
    taken = Counter[str]()
    found = []
    for i, question in enumerate(asked):
        if taken[question.task] < per_task:
            taken[question.task] += 1
            found.append(i)
    return found
