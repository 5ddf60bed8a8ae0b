"""How fast a run is, against what the device could do, and where its time goes.

Model FLOPs utilisation (MFU; Chowdhery et al. 2022, arXiv:2204.02311, appendix B): tokens/s x FLOPs per token over the
peak of all devices. FLOPs per token are those of one forward and backward pass (forward x 3) of the matrix products:
linear layers and head, without the embedding lookup; attention counted half, as causal masks leave half of it.
Recomputation is not counted.
"""

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist

PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}
"""Dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets; the first that fits counts."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s this rank could reach: from the data sheet where it is listed, else measured while all ranks measure, so
    that ranks which share cores find their share."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAK_BF16.items():
            if part in name:
                return flops
    if dist.is_initialized():
        dist.barrier()
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest of the square matrix products that fit in `seconds`."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, spent = float("inf"), 0.0
    torch.mm(a, b)
    while spent < seconds:
        _synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronise(device)
        took = time.perf_counter() - start
        best, spent = min(best, took), spent + took
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Most bytes this process held: device memory on CUDA, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


OUTSIDE = ("init", "preflight", "profile", "publish")
"""What is no part of the loop's time: before it, after it, and reading what the profiler saw of one step."""

MARKS = 256
"""Most steps of a span whose time is remembered."""


class Clock:
    """Where a process's wall time goes, by what the host was doing. Every moment counts once: for the innermost of the
    blocks that it lies in, and outside of them for the phase, which begins as `init`.

    `data` and `evaluation` are times the loop spent there; `checkpoint` is its stall. `compute` is the rest of the
    loop, the step itself, of which one profiled step tells the share of exposed communication: time with a collective
    under way and no compute.

    Args:
        device: on which a step is profiled.
        profiled_step: its number; None for no step.
        age_s: seconds that the process had lived before; they count as `init`.
    """

    def __init__(self, device: torch.device, profiled_step: int | None = None, age_s: float = 0.0):
        self.seconds: dict[str, float] = defaultdict(float)
        self.start = time.perf_counter() - age_s
        self.profiled_step = profiled_step
        self.profiled_every = 0
        """Steps after which another one is profiled; 0 never."""
        self.own_s: float | None = None
        """Seconds of the step that was just profiled in which this rank did not wait for others."""
        self.spans: list[list[tuple[int, float]]] = []
        """Steps that were trained in one go: (steps done, seconds of training until then), first and last and some of
        those between, the older the fewer. Going back to an earlier step begins another span."""
        self._device = device
        self._communication = 0.0
        self._what, self._since = "init", self.start
        self._lock = threading.Lock()

    @property
    def total_s(self) -> float:
        return time.perf_counter() - self.start

    @property
    def what(self) -> str:
        """What time counts for now."""
        return self._what

    def turn(self, what: str) -> str:
        """What time counts for from here on; returns what it counted for before."""
        with self._lock:
            now = time.perf_counter()
            self.seconds[self._what] += now - self._since
            before, self._what, self._since = self._what, what, now
        return before

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        before = self.turn(what)
        try:
            yield
        finally:
            self.turn(before)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one training step, the `number`-th from 0; the one that was chosen runs under the profiler."""
        if not self.spans or self.spans[-1][-1][0] != number:
            self.spans.append([(number, self.spans[-1][-1][1] if self.spans else 0.0)])
        with self._profiled() if self._is_profiled(number) else nullcontext():
            yield
        span = self.spans[-1]
        span.append((number + 1, self.trained_s()))
        if len(span) > MARKS:
            del span[1 : MARKS // 2 : 2]

    def _is_profiled(self, number: int) -> bool:
        if self.profiled_step is None or number < self.profiled_step:
            return False
        return number == self.profiled_step or (self.profiled_every > 0 and number % self.profiled_every == 0)

    @contextmanager
    def _profiled(self) -> Iterator[None]:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would report its own stages on stderr
        _synchronise(self._device)
        # Not torch.profiler: entering that one imports the compiler, which takes seconds.
        device = "cuda" if self._device.type == "cuda" else None
        with torch.autograd.profiler.profile(use_device=device, use_kineto=True) as profile:  # only Kineto sees kernels
            start = time.perf_counter()
            yield
            _synchronise(self._device)
            took = time.perf_counter() - start
        with self.on("profile"):
            waited = exposed_communication(profile.function_events or [], self._device.type)
            self._communication = waited / took
            self.own_s = took - waited

    def trained_s(self) -> float:
        """Seconds of training steps until now: data, compute and communication."""
        spent = self.spent()
        return spent["data"] + spent["compute"] + spent["communication"]

    def spent(self) -> dict[str, float]:
        """Seconds until now by what they went for, together `total_s`; from any thread."""
        with self._lock:
            spent = defaultdict(float, self.seconds)
            spent[self._what] += time.perf_counter() - self._since
        step = spent["compute"]
        return {
            **dict.fromkeys(("data", "checkpoint", "evaluation"), 0.0),
            **spent,
            "compute": step * (1 - self._communication),
            "communication": step * self._communication,
        }

    def shares(self) -> dict[str, float]:
        """Share of the loop's wall time; together 1."""
        spent = {what: seconds for what, seconds in self.spent().items() if what not in OUTSIDE}
        total = max(sum(spent.values()), 1e-9)
        return {what: seconds / total for what, seconds in spent.items()}


def exposed_communication(events: Iterable, device_type: str) -> float:
    """Seconds in which a collective was under way while nothing was computed.

    On CUDA both are kernels; on the CPU collectives are gloo's worker threads, compute is every innermost operator.
    """
    communication, compute = [], []
    for event in events:
        on_device = str(event.device_type).endswith("CUDA")
        if on_device != (device_type == "cuda"):
            continue
        if on_device and event.is_user_annotation:  # a span that FSDP2 names over kernels, communication included
            continue
        interval = (event.time_range.start, event.time_range.end)
        if event.name.startswith("gloo:") or (on_device and "nccl" in event.name.lower()):
            communication.append(interval)
        elif on_device or (event.name.startswith("aten::") and not event.cpu_children):
            compute.append(interval)
    return (_covered(communication + compute) - _covered(compute)) * 1e-6


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union."""
    length, end = 0.0, float("-inf")
    for left, right in sorted(intervals):
        length += max(0.0, right - max(left, end))
        end = max(end, right)
    return length
