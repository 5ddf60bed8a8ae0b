"""The engines' bench compares like with like."""

import pytest

from tools.benches import engines
from tools.benches.communication import Communication
from tools.benches.engines import Engines, Race


@pytest.mark.slow
def test_all_contenders_see_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "RACES", (Race("dp2.zero1", ("native", "deepspeed", "megatron")),))
    task = Communication(layers=2, hidden=64, vocabulary=256, sequence_length=32)
    figures = Engines(task=task, steps=2, warm_up=1).run()
    for other in ("deepspeed", "megatron"):
        assert figures[f"dp2.zero1: {other}, largest difference of the loss"] < 5e-6
        assert figures[f"dp2.zero1: {other} / native, median of steps"] > 0
