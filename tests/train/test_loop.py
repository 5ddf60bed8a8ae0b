"""The loop's order of things, on an engine that only writes down what is asked of it."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from conf.errors import LongrunError, OccupiedError
from data_pipeline.batch import MicroBatch
from parallel import distributed
from parallel.engine import StepResult
from parallel.layout import Layout
from tests.ranks import run_ranks
from train.guard import FaultError, Guard, Patrol
from train.loop import End, Loop, Validation
from train.metrics.base import Metrics, Run
from train.monitor import Monitor, Rates
from train.progress import Progress
from train.rundir import recipe, together
from train.signals import StopSignals
from train.stages.training import Training
from train.throughput import Clock, exposed_communication, measured_flops, peak_flops

STEPS = 6
SKIPPING = Guard(nonfinite="skip", max_skipped=2)


@dataclass
class Recorder:
    """Engine, loader, schedule, checkpoints and sink in one: every call becomes an event."""

    validation_losses: list[float] = field(default_factory=lambda: [1.0] * 99)
    skipped_steps: tuple[int, ...] = ()
    spikes: tuple[int, ...] = ()
    events: list[tuple] = field(default_factory=list)
    steps_done: int = 0
    stall_s: float = 0.0

    # Engine
    def train_step(self, micro_batches, objective, learning_rate_factor):
        self.steps_done += 1
        self.events.append(("train", self.steps_done, learning_rate_factor))
        skipped = self.steps_done in self.skipped_steps + self.spikes
        loss = torch.tensor(math.nan if self.steps_done in self.skipped_steps else float(self.steps_done))
        return StepResult(loss, torch.tensor(4.0), torch.tensor(0.5), torch.tensor(float(skipped)))

    def evaluate(self, micro_batches, objective, ema=False):
        self.events.append(("evaluate", self.steps_done, ema))
        zero = torch.tensor(0.0)
        return StepResult(torch.tensor(self.validation_losses.pop(0)), zero, zero, zero)

    def state(self):
        return {}

    # Loader
    def batch(self, step):
        self.events.append(("batch", step))
        ones = torch.ones(2, 4, dtype=torch.int64)
        documents = torch.tensor([[0, 0, 0, 0], [0, 0, -1, -1]])  # six tokens, two of padding
        return [MicroBatch(ones, ones, ones, documents, torch.arange(2) + 2 * step)]

    # Schedule
    def factor(self, step, total):
        return (total - step) / total

    # Checkpoints
    def due(self, step):
        return step % 2 == 0

    def save(self, step, state, trainer):
        self.events.append(("save", step, trainer))

    def wait(self):
        return True

    # Logger and sink
    def open(self, run):
        return self

    def alert(self, kind, text):
        self.events.append(("alert", kind, text))

    def log(self, step, values):
        self.events.append(("log", step, dict(values)))


def loop_of(recorder, progress=None, validate_every=2, patience=0, guard=Guard(), signals=None, log_every=1):
    world = distributed.start()
    progress = progress or Progress()
    recorder.steps_done = progress.step
    clock = Clock(world.device)
    metrics = Metrics({"recorder": recorder}, Run("a", None, {}, STEPS, 0))
    monitor = Monitor(
        progress,
        metrics,
        clock,
        Rates(flops_per_token=1.0, peak_flops=100.0),
        steps=STEPS,
        log_every=log_every,
        guard=guard,
        copies=1,
        device=world.device,
        group=dist.group.WORLD,
    )
    validation = Validation(recorder, None, [], progress, monitor, validate_every, patience, ema=True)
    return Loop(
        engine=recorder,
        objective=None,
        loader=recorder,
        schedule=recorder,
        learning_rate=0.1,
        steps=STEPS,
        progress=progress,
        monitor=monitor,
        patrol=Patrol(recorder, every=0),
        checkpoints=recorder,
        validation=validation,
        clock=clock,
        signals=signals or StopSignals(),
    )


def _run(recorder, options):
    loop = loop_of(recorder, **options)
    return loop.run(), recorder.events, loop.progress


def ran(recorder=None, **options):
    return run_ranks(1, _run, recorder or Recorder(), options)[0]


def kinds(events, *wanted):
    return [(event[0], event[1]) for event in events if event[0] in wanted]


def test_a_step_is_saved_before_it_is_validated():
    end, events, progress = ran()
    assert end == End.FINISHED and progress.step == STEPS
    order = [("evaluate", 0)]
    for step in range(1, STEPS + 1):
        order.append(("train", step))
        if step % 2 == 0:
            order += [("save", step), ("evaluate", step)]
    assert kinds(events, "train", "save", "evaluate") == [*order, ("save", STEPS)]
    assert all(event[2] for event in events if event[0] == "evaluate"), "not the averaged weights"


def test_every_step_gets_the_schedules_factor_and_the_batch_of_its_number():
    _, events, _ = ran()
    assert [event[1] for event in events if event[0] == "batch"] == list(range(STEPS))
    assert [event[2] for event in events if event[0] == "train"] == [(STEPS - s) / STEPS for s in range(STEPS)]
    lines = [event[2] for event in events if event[0] == "log" and "lr" in event[2]]
    assert [line["lr"] for line in lines] == pytest.approx([0.1 * (STEPS - s) / STEPS for s in range(STEPS)])


def test_figures_are_read_one_step_late_and_all_are_read_before_a_save():
    _, events, _ = ran()
    order = [(e[0], e[1]) for e in events if e[0] == "train" or (e[0] == "log" and "loss" in e[2]) or e[0] == "save"]
    assert order[:7] == [("train", 1), ("train", 2), ("log", 1), ("log", 2), ("save", 2), ("train", 3), ("train", 4)]
    assert [e[2]["step"] for e in events if e[0] == "save"] == [2, 4, 6, 6]
    assert [e[2]["tokens"] for e in events if e[0] == "save"] == [12, 24, 36, 36], "padding is no token"
    assert [e[2]["samples"] for e in events if e[0] == "save"] == [4, 8, 12, 12]


def _patrolled():
    loop = loop_of(Recorder(), validate_every=0)
    looks = []
    loop.patrol = SimpleNamespace(check=lambda step, wait=False: looks.append((step, wait)))
    loop.run()
    return looks


def test_the_state_is_looked_at_once_a_step_and_known_to_be_good_before_it_is_saved():
    looks = run_ranks(1, _patrolled)[0]
    assert looks == [(step, step % 2 == 0) for step in range(1, STEPS + 1)] + [(STEPS, True)]


def test_early_stopping_counts_validations_since_the_best():
    losses = [5.0, 3.0, 4.0, 3.5, 1.0]
    end, _, progress = ran(Recorder(losses), patience=2)
    assert end == End.NO_GAIN and progress.step == 6
    assert progress.best_validation_loss == 3.0
    end, _, progress = ran(Recorder([5.0, 6.0, 7.0]), patience=2)
    assert end == End.NO_GAIN and progress.step == 4


def test_a_validation_repeated_after_a_restart_counts_once():
    progress = Progress(step=2, validated=2, best_validation_loss=5.0, validations_without_gain=1)
    _, events, after = ran(Recorder([6.0, 6.0, 4.0]), progress=progress, patience=3)
    assert kinds(events, "evaluate", "train")[:2] == [("evaluate", 2), ("train", 3)]
    assert after.best_validation_loss == 4.0 and after.validations_without_gain == 0
    progress = Progress(step=2, validated=0, best_validation_loss=5.0, validations_without_gain=0)
    assert ran(Recorder([6.0, 6.0, 6.0]), progress=progress, patience=3)[2].validations_without_gain == 3


def test_skipped_steps_are_remembered_and_too_many_in_a_row_end_the_run():
    _, events, progress = ran(Recorder(skipped_steps=(2, 3, 5)), guard=SKIPPING)
    assert progress.skipped == [2, 3, 5]
    assert [e[1] for e in events if e[0] == "log" and e[2].get("skipped")] == [2, 3, 5]
    message = run_ranks(1, _diverged, Recorder(skipped_steps=(2, 3, 4)), Progress())[0]
    assert "step 4 was left out" in message and "number 3 in a row" in message and "guard.max_skipped=2" in message


def test_spikes_and_what_is_not_finite_are_told_apart_and_counted_together():
    _, events, progress = ran(Recorder(skipped_steps=(2,), spikes=(3, 5)), guard=SKIPPING)
    assert progress.skipped == [2, 3, 5]
    assert [e[2]["spike"] for e in events if e[0] == "log" and e[2].get("skipped")] == [0, 1, 1]
    assert [e[1] for e in events if e[0] == "alert"] == ["fault", "spike", "spike"]
    message = run_ranks(1, _diverged, Recorder(skipped_steps=(2, 3), spikes=(4,)), Progress())[0]
    assert "far above those before: loss 4, norm 0.5" in message and "raise guard.spike_strength" in message
    message = run_ranks(1, _diverged, Recorder(skipped_steps=(4,), spikes=(2, 3)), Progress())[0]
    assert "not finite: loss nan" in message and "spike_strength" not in message


def test_skips_before_a_restart_count():
    progress = Progress(step=3, skipped=[2, 3])
    assert "number 3 in a row" in run_ranks(1, _diverged, Recorder(skipped_steps=(4,)), progress)[0]


def _diverged(recorder, progress):
    try:
        _run(recorder, {"progress": progress, "guard": SKIPPING})
    except FaultError as error:
        alerts = [event[2] for event in recorder.events if event[0] == "alert"]
        assert not any(text.startswith("step 4 ") for text in alerts), "the fault is told by who answers it"
        return str(error)


def _asked(steps):
    world = distributed.start()
    signals = StopSignals()
    recorder = Recorder()
    train_step = recorder.train_step

    def interrupted(*args):
        if recorder.steps_done + 1 == steps and world.rank == world.size - 1:
            signals.received = "SIGTERM"
        return train_step(*args)

    recorder.train_step = interrupted
    loop = loop_of(recorder, validate_every=0, signals=signals)
    loop.checkpoints = SimpleNamespace(due=lambda step: False, save=recorder.save, wait=recorder.wait)
    return loop.run(), loop.progress.step, kinds(recorder.events, "save")


def test_all_ranks_stop_at_the_same_step_with_a_checkpoint_when_one_is_asked():
    for end, step, saves in run_ranks(2, _asked, 2):
        assert end == End.ASKED and step == 3 and saves == [("save", 3)]


def test_a_request_during_the_last_step_changes_nothing():
    for end, step, _ in run_ranks(2, _asked, STEPS):
        assert end == End.FINISHED and step == STEPS


def test_log_every_thins_the_lines_but_not_the_counts():
    _, events, progress = ran(Recorder(), log_every=4, validate_every=0)
    assert [e[1] for e in events if e[0] == "log"] == [1, 4, 6]
    assert progress.tokens == 36


def test_shares_of_time_add_up_to_one():
    clock = Clock(torch.device("cpu"))
    with clock.on("data"):
        sum(range(10000))
    shares = clock.shares()
    assert shares.keys() == {"data", "compute", "communication", "checkpoint", "evaluation"}
    assert sum(shares.values()) == pytest.approx(1) and shares["data"] > 0


def event(name, start, end, device="CPU", children=(), annotation=False):
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        device_type=f"DeviceType.{device}",
        cpu_children=children,
        is_user_annotation=annotation,
    )


def test_only_communication_that_no_computation_hides_is_counted():
    gloo = [event("gloo:all_reduce", 0, 100), event("gloo:all_reduce", 50, 150)]
    compute = [event("aten::mm", 20, 40), event("aten::linear", 0, 300, children=(1,)), event("aten::mm", 140, 200)]
    assert exposed_communication([*gloo, *compute], "cpu") == pytest.approx((150 - 20 - 10) * 1e-6)
    kernels = [event("ncclDevKernel", 0, 10, "CUDA"), event("gemm", 5, 30, "CUDA"), event("gloo:x", 0, 99)]
    spans = [event("FSDP::all_gather", 0, 10, "CUDA", annotation=True)]
    assert exposed_communication([*kernels, *spans], "cuda") == pytest.approx(5e-6)


def test_on_a_gpu_the_profiled_step_records_kernels(monkeypatch):
    asked = {}
    profile = torch.autograd.profiler.profile
    monkeypatch.setattr(torch.autograd.profiler, "profile", lambda **settings: asked.update(settings) or profile())
    monkeypatch.setattr("train.throughput._synchronise", lambda device: None)
    with Clock(torch.device("cuda"), 3).step(3):
        pass
    assert asked == {"use_device": "cuda", "use_kineto": True}  # without Kineto torch records the host's side alone


@pytest.mark.parametrize(
    ("name", "tera"), [("L4", 121), ("L40", 181), ("L40S", 362), ("H100 PCIe", 756), ("H200", 989)]
)
def test_the_peak_of_a_gpu_is_that_of_its_own_data_sheet(monkeypatch, name, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {name}")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == tera * 1e12


def test_the_measured_peak_is_not_below_a_plain_product():
    assert measured_flops(torch.device("cpu"), torch.float32, seconds=0.05) > 1e9


def _one_fails(kind):
    rank = distributed.start().rank
    try:
        with together():
            if rank == 1 or kind == "all":
                raise OccupiedError("same" if kind == "all" else "only rank 1")
    except (LongrunError, SystemExit) as error:
        return type(error).__name__, str(error)


def test_an_error_of_one_rank_ends_all_and_is_told_once():
    told = [("SystemExit", "73"), ("OccupiedError", "only rank 1"), ("SystemExit", "73")]
    assert run_ranks(3, _one_fails, "one") == told
    assert run_ranks(2, _one_fails, "all") == [("OccupiedError", "same"), ("SystemExit", "73")]


def test_every_value_out_of_range_is_named_at_once():
    values = {"steps": 0, "keep": 0, "patience": 2, "ema": 1.0, "precision": "int3", "clip": -1.0, "log_every": 0}
    stage = Training(**values)
    keys = {
        problem.key
        for problem in stage.problems(SimpleNamespace(parallel=Layout(dp_shard=2), init_from="a"), world_size=1)
    }
    assert keys == {*(f"stage.{name}" for name in values), "parallel.dp_shard"}


def test_a_recipe_leaves_out_what_does_not_change_the_result():
    config = {
        "run_dir": "a",
        "parallel": {"zero": 1},
        "stage": {"steps": 3, "keep": 1},
        "data": {"path": "x", "sequence_length": 8},
        "logger": {},
    }
    assert recipe(config) == {"stage.steps": 3, "data.sequence_length": 8}
