import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from data_pipeline.chat import ChatData
from data_pipeline.mixture import MixtureData
from data_pipeline.preference import PreferenceData
from data_pipeline.text import TextData
from parallel.engine import Outputs
from tests.data_pipeline.chats import tokenizer, write_jsonl
from tests.data_pipeline.test_preference import pair
from train.objectives.dpo import DPO


class Bigram:
    """An engine whose model is a table of log-probabilities, and which counts its calls."""

    device = torch.device("cpu")

    def __init__(self, seed: int = 0, dp_rank: int = 0, dp_size: int = 1):
        self.table = torch.randn(512, 512, generator=torch.Generator().manual_seed(seed))
        self.dp_rank, self.dp_size, self.calls = dp_rank, dp_size, 0

    def logprobs(self, batch):
        self.calls += 1
        logprobs_BLV = F.log_softmax(self.table[batch.tokens_BL], -1)
        picked_BL = logprobs_BLV.gather(-1, batch.labels_BL.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return picked_BL.masked_fill(batch.labels_BL == -100, 0)


@pytest.fixture
def samples(tmp_path):
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    records = [pair(f"What is {i}?", words[i % 8], f"{words[(i + 3) % 8]} {i}") for i in range(70)]
    write_jsonl(tmp_path / "preferences_train.jsonl", records)
    return PreferenceData(path=str(tmp_path)).open("train", tokenizer(), 0)


def terms(objective, engine, batch):
    return objective.loss(Outputs(engine.logprobs(batch)), batch)


def test_the_first_step_has_no_margin_and_the_loss_of_a_coin_flip(samples, tmp_path):
    engine = Bigram()
    batch = DPO().setup(engine, samples, tmp_path / "run").micro_batch([3, 1, 65])
    result = terms(DPO(), engine, batch)
    assert result.weight == 3
    torch.testing.assert_close(result.total, torch.tensor(3 * math.log(2)))
    assert result.metrics["margin"].abs() < 1e-5


def test_the_loss_is_that_of_the_paper_written_out_pair_by_pair(samples, tmp_path):
    before, after = Bigram(0), Bigram(1)
    objective = DPO(beta=0.3, label_smoothing=0.1)
    batch = objective.setup(before, samples, tmp_path / "run").micro_batch([3, 1])
    total, margins = 0.0, []
    for p in range(2):
        reward = {}
        for side, row in (("chosen", p), ("rejected", p + 2)):
            ratio = 0.0
            for token, label in zip(batch.tokens_BL[row].tolist(), batch.labels_BL[row].tolist(), strict=True):
                if label != -100:
                    ratio += float(
                        F.log_softmax(after.table[token], -1)[label] - F.log_softmax(before.table[token], -1)[label]
                    )
            reward[side] = 0.3 * ratio
        margins.append(reward["chosen"] - reward["rejected"])
        sigmoid = 1 / (1 + math.exp(-margins[-1]))
        total -= 0.9 * math.log(sigmoid) + 0.1 * math.log(1 - sigmoid)
    result = terms(objective, after, batch)
    assert result.total.item() == pytest.approx(total, rel=1e-4)
    assert result.metrics["margin"].item() == pytest.approx(sum(margins), rel=1e-4)
    assert result.metrics["accuracy"].item() == sum(m > 0 for m in margins)
    rewards = result.metrics["chosen_reward"] - result.metrics["rejected_reward"]
    torch.testing.assert_close(rewards, result.metrics["margin"], rtol=1e-4, atol=1e-5)


def test_swapping_a_pair_negates_the_margin(samples, tmp_path):
    engine, objective = Bigram(1), DPO()
    batch = objective.setup(Bigram(0), samples, tmp_path / "run").micro_batch([3, 1])
    swapped = type(batch)(**{name: torch.cat([value[2:], value[:2]]) for name, value in vars(batch).items()})
    forward, backward = (terms(objective, engine, b).metrics for b in (batch, swapped))
    torch.testing.assert_close(forward["margin"], -backward["margin"])
    assert forward["accuracy"] == 2 - backward["accuracy"]


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected(samples, tmp_path):
    batch = DPO().setup(Bigram(), samples, tmp_path / "run").micro_batch([3, 1])
    logprobs_BL = Bigram().logprobs(batch).requires_grad_()
    DPO().loss(Outputs(logprobs_BL), batch).total.backward()
    labelled_BL = batch.labels_BL != -100
    assert (logprobs_BL.grad[:2][labelled_BL[:2]] < 0).all() and (logprobs_BL.grad[2:][labelled_BL[2:]] > 0).all()
    assert (logprobs_BL.grad[~labelled_BL] == 0).all()


def test_a_restart_reads_the_reference_and_does_not_ask_the_moved_weights(samples, tmp_path):
    first = DPO().setup(Bigram(0), samples, tmp_path / "run").micro_batch([0, 69]).reference_logprobs_B
    moved = Bigram(1)
    again = DPO().setup(moved, samples, tmp_path / "run").micro_batch([0, 69]).reference_logprobs_B
    assert moved.calls == 0 and torch.equal(first, again)


def test_another_set_of_pairs_has_its_own_reference(samples, tmp_path):
    DPO().setup(Bigram(0), samples, tmp_path / "run")
    others = copy.copy(samples)
    others.fingerprint = "others"
    engine = Bigram(0)
    DPO().setup(engine, others, tmp_path / "run")
    assert engine.calls > 0
    assert len(list((tmp_path / "run").glob("reference-*.npy"))) == 2


def test_the_ranks_share_the_work_and_agree_with_one_rank(samples):
    from train.objectives.dpo import reference_logprobs

    alone = reference_logprobs(Bigram(), samples)
    engines = [Bigram(dp_rank=rank, dp_size=3) for rank in range(3)]
    shares = torch.stack([reference_logprobs(engine, samples) for engine in engines])
    assert torch.equal(shares.amax(0), alone) and not alone.isinf().any()
    assert {engine.calls for engine in engines} == {2}, "collective calls: as many on every rank"


def test_settings_that_cannot_work_are_problems():
    pairs = SimpleNamespace(data=PreferenceData())
    assert [p.key for p in DPO(beta=0, label_smoothing=0.5).problems(pairs, 1)] == [
        "objective.beta",
        "objective.label_smoothing",
    ]
    assert DPO().problems(pairs, 1) == []


@pytest.mark.parametrize("data", [TextData(), MixtureData(), ChatData()], ids=["text", "mixture", "chat"])
def test_data_without_pairs_are_a_problem(data):
    [problem] = DPO().problems(SimpleNamespace(data=data), 1)
    assert problem.key == "objective" and "data=preference" in problem.fix
