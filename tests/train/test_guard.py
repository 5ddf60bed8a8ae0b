"""Silent faults in whole runs: found, named, and gone back from as if nothing had happened."""

import contextlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from conf import entry
from conf.registry import OPTIONS
from data_pipeline.artifact import Artifact
from parallel import distributed
from parallel.engine import Settings
from parallel.engines.native import NativeEngine
from parallel.layout import Layout
from parallel.reduce import local_of
from tests.ranks import run_ranks
from tests.train.runs import SETTINGS
from tests.train.test_resume import assert_same_run
from tools.parity import ADAMW, MODEL, VOCABULARY, batch_of, shares
from train.__main__ import main
from train.config import RunConfig
from train.guard import FaultError, Guard, Patrol
from train.models.transformer import initialise
from train.objectives.clm import CausalLM

pytestmark = pytest.mark.timeout(600)
STEPS = ("stage.steps=12", "stage.checkpoint_every=4", "stage.ema=0.9", "model.dropout=0.1")
REPLICATED = ("parallel.dp_shard=2", "parallel.zero=0")
SHARDED = ("parallel.dp_shard=2", "parallel.zero=2")
WEIGHT = "model.model.layers.0.mlp.up_proj.weight"
MOMENT = "optimizer.model.layers.1.self_attn.q_proj.weight.exp_avg_sq"


@dataclass
class Fault:
    """One that befalls a rank.

    Args:
        what: "memory" before the gradients of a step, "replicas" after its update, "gradient" before it: NaN, or
            "computation": one bit.
        step: from 1.
        rank: whom.
        tensor: of the engine's state.
        times: how often.
    """

    what: str
    step: int
    rank: int
    tensor: str = WEIGHT
    times: int = 1

    def befalls(self, what: str, step: int) -> bool:
        hit = (what, step, distributed.start().rank) == (self.what, self.step, self.rank) and self.times > 0
        self.times -= hit
        return hit


def flip(tensor: Tensor, element: int = 5, bit: int = 3) -> None:
    local_of(tensor.detach()).view(torch.int32).view(-1)[element] ^= 1 << bit


@contextlib.contextmanager
def faulty(faults: Sequence[Fault]):
    """Engines that are not to be trusted."""
    step, passes = NativeEngine.train_step, NativeEngine._pass

    def train_step(self, *arguments):
        result = step(self, *arguments)
        for fault in faults:
            if fault.befalls("replicas", int(self.steps)):
                flip(self.state()[fault.tensor])
        return result

    def _pass(self, micro_batches, objective, training):
        for fault in faults if training else ():
            if fault.befalls("memory", int(self.steps) + 1):
                flip(self.state()[fault.tensor])
        sums = passes(self, micro_batches, objective, training)
        for fault in faults if training else ():
            if fault.befalls("gradient", int(self.steps) + 1):
                local_of(self.parameters[fault.tensor.removeprefix("model.")].grad).view(-1)[7] = torch.nan
            if fault.befalls("computation", int(self.steps) + 1):
                flip(self.parameters[fault.tensor.removeprefix("model.")].grad)
        return sums

    NativeEngine.train_step, NativeEngine._pass = train_step, _pass
    try:
        yield
    finally:
        NativeEngine.train_step, NativeEngine._pass = step, passes


def several(corpus: Path, runs: dict[Path, tuple[Sequence[str], Sequence[Fault]]]) -> dict[str, tuple[int, str]]:
    """Runs one after the other; exit code and output of each."""
    ended = {}
    for run_dir, (settings, faults) in runs.items():
        said = io.StringIO()
        sys.argv = ["train", "stage=pretrain", f"data.path={corpus}", f"run_dir={run_dir}", *SETTINGS, *settings]
        groups = mock.patch.object(dist, "new_group", wraps=dist.new_group)
        with faulty(faults), groups as made, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                entry.run("train", RunConfig, main)
                code = 0
            except SystemExit as end:
                code = end.code
        ended[run_dir.name] = code, f"{said.getvalue()}\n{made.call_count} groups of ranks were made"
    return ended


RUNS = {
    "unguarded": (("guard.every=0",), ()),
    "guarded": (("guard.every=1", "guard.repeat_every=3"), ()),
    "disturbed": (
        ("guard.every=1", "guard.nonfinite=roll_back", "guard.repeat_every=1"),
        (
            Fault("memory", 6, 1),
            Fault("computation", 8, 1),
            Fault("replicas", 9, 0, MOMENT),
            Fault("gradient", 11, 1, times=2),  # in both passes
        ),
    ),
    "seldom": (("guard.every=100",), (Fault("replicas", 7, 1, MOMENT),)),
    "stopped": (("guard.every=1", "guard.memory=stop"), (Fault("memory", 6, 1, MOMENT),)),
    "too_early": (("guard.every=1",), (Fault("replicas", 2, 1),)),
}


@pytest.fixture(scope="module")
def replicated(corpus, tmp_path_factory) -> tuple[Path, list[dict[str, tuple[int, str]]]]:
    """Two ranks that hold the same."""
    room = tmp_path_factory.mktemp("guard")
    runs = {room / name: ((*STEPS, *REPLICATED, *settings), faults) for name, (settings, faults) in RUNS.items()}
    return room, run_ranks(2, several, corpus, runs, timeout_s=400)


def roll_backs(run_dir: Path) -> float:
    return Artifact.read(run_dir).metrics["roll_backs"]


def test_a_guarded_run_is_bit_identical_to_one_that_is_not(replicated):
    room, ended = replicated
    assert [rank[name][0] for rank in ended for name in ("unguarded", "guarded")] == [0] * 4
    assert_same_run(room / "guarded", room / "unguarded")


def test_a_run_that_went_back_four_times_is_bit_identical_to_an_undisturbed_one(replicated):
    room, ended = replicated
    code, said = ended[0]["disturbed"]
    assert code == 0, said
    assert roll_backs(room / "disturbed") == 4
    assert_same_run(room / "disturbed", room / "unguarded")


def test_going_back_makes_no_groups_of_ranks(replicated):
    guarded, disturbed = (replicated[1][0][name][1].splitlines()[-1] for name in ("guarded", "disturbed"))
    assert guarded == disturbed and guarded.endswith("groups of ranks were made")


def test_what_went_wrong_is_told_with_kind_step_rank_host_and_tensor(replicated):
    said = replicated[1][0]["disturbed"][1]
    memory, computation, replicas, nonfinite = [line for line in said.splitlines() if line.startswith("fault: ")]
    assert "between the updates of steps 5 and 6" in memory and f"{WEIGHT} on rank 1 (on " in memory
    assert "after step 9" in replicas and f"{MOMENT} between rank 0-1 (on " in replicas
    assert "step 11 was left out, loss or gradient norm not finite" in nonfinite
    assert "step 8 was left out, computed twice, its gradients differ on 1 rank(s)" in computation
    assert all("Rolled back to" in line for line in (memory, replicas, computation, nonfinite))


def test_no_checkpoint_is_written_of_a_state_that_is_not_good(replicated):
    room, ended = replicated
    code, said = ended[0]["seldom"]
    assert code == 0 and "after step 8" in said and "step-00000004" in said
    assert_same_run(room / "seldom", room / "unguarded")


def test_a_policy_of_stop_ends_the_run_and_names_the_last_checkpoint(replicated):
    code, said = replicated[1][0]["stopped"]
    assert code == 1 and f"{MOMENT} on rank 1" in said
    assert f"The last checkpoint is {replicated[0] / 'stopped' / 'checkpoints' / 'step-00000004'}." in said


def test_before_the_first_checkpoint_the_run_asks_to_be_started_again(replicated):
    for rank in replicated[1]:
        assert rank["too_early"][0] == 76
    assert "start the same command again" in replicated[1][0]["too_early"][1]


def test_of_shards_that_nobody_else_holds_the_memory_is_watched(corpus, tmp_path):
    faults = (Fault("memory", 6, 1), Fault("memory", 9, 0, "ema." + WEIGHT.removeprefix("model.")))
    runs = {
        tmp_path / "quiet": ((*STEPS, *SHARDED), ()),
        tmp_path / "run": ((*STEPS, *SHARDED, "guard.every=1"), faults),
    }
    ended = run_ranks(2, several, corpus, runs)
    assert [rank["run"][0] for rank in ended] == [0, 0], ended[0]["run"][1]
    assert roll_backs(tmp_path / "run") == 2
    assert_same_run(tmp_path / "run", tmp_path / "quiet")


def test_the_same_fault_at_the_same_step_again_ends_the_run():
    guard, earlier = Guard(), [["nonfinite", 9, 4], ["computation", 7, 4]]  # as a checkpoint has them
    guard.judge_roll_back(FaultError("computation", 9, "A flip."), 8, earlier)
    with pytest.raises(FaultError, match=r"A NaN\. The run went back .* and met it again at the same step"):
        guard.judge_roll_back(FaultError("nonfinite", 9, "A NaN."), 8, earlier)


@pytest.mark.parametrize("kind", ["memory", "replicas"])
def test_two_accidents_before_the_same_patrol_are_not_called_the_same(kind):
    Guard().judge_roll_back(FaultError(kind, 20, "Another flip."), 10, [(kind, 20, 10)])
    with pytest.raises(FaultError, match=r"guard\.max_roll_backs=3\. Take the machine"):
        Guard().judge_roll_back(FaultError(kind, 20, "A fourth flip."), 10, [(kind, 20, 10)] * 3)


def test_going_back_to_the_same_checkpoint_too_often_ends_the_run():
    guard = Guard(max_roll_backs=2)
    earlier = [("memory", 5, 4), ("replicas", 4, 0), ("replicas", 7, 4)]
    guard.judge_roll_back(FaultError("memory", 9, "A flip."), 8, earlier)
    with pytest.raises(FaultError, match=r"A flip\. The run went back to the checkpoint of step 4 2 time"):
        guard.judge_roll_back(FaultError("memory", 6, "A flip."), 4, earlier)


def test_every_policy_out_of_range_is_named_at_once():
    values = {"nonfinite": "ignore", "spike": "", "computation": "", "memory": "skip", "replicas": "skip"}
    values |= {"spike_window": 1}
    values |= dict.fromkeys(("spike_strength", "max_skipped", "repeat_every", "every", "max_roll_backs"), -1)
    assert {problem.key for problem in Guard(**values).problems(None, 1)} == {f"guard.{name}" for name in values}


def patrolled(engine: str, layout: Layout) -> tuple[int, str]:
    """Steps before the first finding, and what it says, where a bit of the last rank's flat weights flips."""
    world = distributed.start()
    model = MODEL.build(VOCABULARY)
    initialise(model, 0)
    option = OPTIONS["engine", engine](**({"cpu": True} if engine == "megatron" else {}))
    settings = Settings(precision="fp32", ema=0.9)
    built = option.build(model, layout, ADAMW.build, world=world, settings=settings)
    patrol = Patrol(built, every=1)
    try:
        for step in range(6):
            if step == 3 and world.rank == world.size - 1:
                flats = built.where.flats if engine == "deepspeed" else list(built.masters.flat.values())
                flip(flats[0])
            built.train_step(shares(batch_of(step), built.dp_rank, built.dp_size, 1), CausalLM(), 1.0)
            patrol.check(step + 1, wait=True)
    except FaultError as fault:
        return step, str(fault)
    return 6, ""


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_the_memory_of_deepspeed_is_watched(zero):
    for step, said in run_ranks(2, patrolled, "deepspeed", Layout(dp_shard=2, zero=zero), timeout_s=300):
        assert step == 3 and "state changed between the updates of steps 3 and 4" in said


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(dp_shard=2, zero=1)])
def test_the_memory_of_megatron_is_watched(layout):
    for step, said in run_ranks(2, patrolled, "megatron", layout, timeout_s=300):
        assert step == 3 and "state changed between the updates of steps 3 and 4" in said
