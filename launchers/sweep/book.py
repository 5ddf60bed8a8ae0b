"""A sweep on disk: Optuna's journal of proposals, reports and ends.

Each line of the journal is synced before the next, so that a sweep that was killed finds every trial as it was. The
journal is Optuna's own format: `optuna-dashboard runs/sweeps/NAME/journal.log` shows it.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.artifact import fingerprint
from launchers.sweep.config import SweepConfig
from launchers.sweep.space import Space

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial

JOURNAL = "journal.log"
STUDY = "sweep"
PROGRESS, FAILURE = "progress", "failure"
LEAST_FOR_IMPORTANCE = 8


@dataclass(frozen=True)
class Outcome:
    """What became of one trial.

    Args:
        number: from 0, in the order of the proposals.
        params: key -> value.
        state: "done", "pruned", "failed", or "cut": proposed, and not ended.
        value: the figure that is compared; None without one. That of a pruned trial is its last.
        curve: step -> the figure as it was reported on the way.
        steps: the newest step of any line that it wrote.
        seconds: wall time, over its restarts.
        failure: why it failed.
    """

    number: int
    params: dict[str, Any]
    state: str
    value: float | None
    curve: dict[int, float]
    steps: int
    seconds: float
    failure: str

    @classmethod
    def of(cls, trial: "FrozenTrial") -> "Outcome":
        from optuna.trial import TrialState

        failure = trial.user_attrs.get(FAILURE, "")
        steps, seconds = trial.user_attrs.get(PROGRESS, (0, 0.0))
        states = {TrialState.COMPLETE: "done", TrialState.PRUNED: "pruned"}
        curve = dict(sorted(trial.intermediate_values.items()))
        value = trial.value
        if value is None and curve:
            value = list(curve.values())[-1]
        return cls(
            trial.number,
            dict(trial.params),
            states.get(trial.state, "failed" if failure else "cut"),
            None if value is None or math.isnan(value) else value,
            curve,
            steps,
            seconds,
            failure,
        )


class Book:
    """The study of a sweep whose directory this process holds."""

    def __init__(self, directory: Path, config: SweepConfig, space: Space):
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.config, self.space = config, space
        file = directory / JOURNAL
        _mend(file)
        self._storage = JournalStorage(JournalFileBackend(str(file)))
        self._study = optuna.create_study(
            storage=self._storage,
            study_name=STUDY,
            direction="maximize" if config.maximise else "minimize",
            pruner=config.stopping.pruner(),
            load_if_exists=True,
        )

    def outcomes(self) -> list[Outcome]:
        return [Outcome.of(trial) for trial in self._study.get_trials(deepcopy=False)]

    def outcome(self, trial: "Trial") -> Outcome:
        return self.outcomes()[trial.number]

    def best(self) -> Outcome | None:
        """The finished trial with the best value, the first of equals."""
        finished = [outcome for outcome in self.outcomes() if outcome.state == "done" and outcome.value is not None]
        sign = -1 if self.config.maximise else 1
        return min(finished, key=lambda outcome: sign * (outcome.value or 0.0), default=None)

    def propose(self) -> "Trial":
        """The next trial. Its values depend on its number, the seed and the trials before it, and on nothing else."""
        self._sample_for(len(self._study.get_trials(deepcopy=False)))
        return self._filled(self._study.ask())

    def unfinished(self) -> list["Trial"]:
        """Trials that were proposed and have neither finished nor been pruned: failed ones too, which may be tried
        again once what they failed of is mended."""
        import optuna
        from optuna.trial import TrialState

        study = self._storage.get_study_id_from_name(STUDY)
        trials = []
        for frozen in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._sample_for(frozen.number)
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(study, frozen.number)
            trials.append(self._filled(optuna.Trial(self._study, trial_id)))
        return trials

    def _sample_for(self, number: int) -> None:
        seed = int(fingerprint([self.config.seed, number])[:8], 16)
        self._study.sampler = self.config.search.sampler(self.space, number, seed)

    def _filled(self, trial: "Trial") -> "Trial":
        """With a value for every key: a kill may have come between two of them."""
        for key, values in self.space.items():
            values.suggest(trial, key)
        return trial

    def came_to(self, trial: "Trial", steps: int, seconds: float) -> None:
        trial.set_user_attr(PROGRESS, (steps, round(seconds, 3)))

    def failed(self, trial: "Trial", why: str) -> None:
        """Note why it did; the empty text when it is tried again."""
        if trial.user_attrs.get(FAILURE, "") != why:
            trial.set_user_attr(FAILURE, why)

    def falls_behind(self, trial: "Trial") -> bool:
        """Whether the stopping rule ends it at the newest value that it reported."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of values that are not numbers
            return trial.should_prune()

    def finish(self, trial: "Trial", value: float) -> None:
        self._study.tell(trial, value)

    def prune(self, trial: "Trial") -> None:
        from optuna.trial import TrialState

        self._study.tell(trial, state=TrialState.PRUNED)

    def importance(self) -> dict[str, float]:
        """Key -> its share in what separates the good trials from the rest (PED-ANOVA, Watanabe et al. 2023,
        arXiv:2304.10255); none while too few have finished for it to mean anything."""
        from optuna.importance import get_param_importances

        if sum(outcome.state == "done" for outcome in self.outcomes()) < LEAST_FOR_IMPORTANCE:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that had one value only
            return get_param_importances(self._study)


def _mend(file: Path) -> None:
    """Take away what a kill inside a write left: half a line, which Optuna would not read past, and its lock."""
    file.with_name(file.name + ".lock").unlink(missing_ok=True)
    if file.exists() and (content := file.read_bytes()) and not content.endswith(b"\n"):
        with open(file, "r+b") as stream:
            stream.truncate(content.rfind(b"\n") + 1)
