"""Burn-in: the preflight of a run by itself, at length, before anything is trained on these machines."""

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import LongrunError
from conf.registry import register
from data_pipeline.artifact import Draft, locked, withdraw, write_atomically
from parallel import distributed
from parallel.distributed import World
from train.preflight.base import Record
from train.preflight.table import table
from train.rundir import check_agreement, recipe, together, with_options
from train.stages.base import DONE
from train.stages.training import Training
from train.start import Start

if TYPE_CHECKING:
    from train.config import RunConfig

REPORT = "preflight.json"


@register("stage", "burn_in")
@dataclass(frozen=True)
class BurnIn(Training):
    """Measure every machine and link, write a report, and end with an error that names those that are not fit.

    It takes the configuration of the run that it is for: layout, model and precision decide what is measured.

    Args:
        kind: what the report is called.
        inputs: look at the data and initial weights as well.
    """

    kind: str = "preflight"
    inputs: bool = True

    def run(self, config: "RunConfig", resolved: dict[str, Any]) -> int:
        """Measure, tell, and publish where all are fit.

        Raises:
            PreflightError: names every machine and input that is not fit; the report is written all the same.
            OccupiedError, LiveRunError: run_dir holds something else, or is being written.
            DisagreementError: the ranks were not started alike.
        """
        with ExitStack() as stack:
            world = stack.enter_context(distributed.joined(**config.failures.limits))
            check_agreement(with_options(config, resolved))
            directory = Path(config.run_dir)
            with together():
                if world.rank == 0:
                    stack.enter_context(locked(directory, config.failures.lease_s))
                    withdraw(directory, self.kind)
            start, problem = self._start(config)
            records = config.preflight.measure(config, start, directory, world, problem)
            with together():
                if world.rank == 0:
                    self._tell(config, resolved, directory, world, records)
        return DONE

    def _start(self, config: "RunConfig") -> tuple[Start | None, str]:
        if not self.inputs:
            return None, ""
        try:
            return Start.of(config), ""
        except LongrunError as error:
            return None, str(error)

    def _tell(
        self,
        config: "RunConfig",
        resolved: dict[str, Any],
        directory: Path,
        world: World,
        records: list[Record],
    ) -> None:
        findings = config.preflight.judge(records)
        report = {
            "processes": world.size,
            "machines": len({record.host for record in records}),
            "layout": asdict(config.parallel),
            "limits": asdict(config.preflight),
            "findings": [asdict(finding) for finding in findings],
            "ranks": [asdict(record) for record in records],
        }
        write_atomically(directory / REPORT, json.dumps(report, indent=1) + "\n")
        wrong = [rank for finding in findings if finding.check != "inputs" for rank in finding.ranks]
        print(f"{table(records, wrong)}\nall figures are in {directory / REPORT}", flush=True)
        config.preflight.insist(findings)
        draft = Draft(directory, self.kind, recipe(resolved), {}, metrics={"machines": report["machines"]})
        print(f"{directory} is done: all fit ({draft.publish(REPORT).id})", flush=True)
