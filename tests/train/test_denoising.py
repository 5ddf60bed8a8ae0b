"""Masked language modelling and fill-in-the-middle: what they do to a window of text."""

from dataclasses import fields
from itertools import pairwise

import pytest
import torch

from data_pipeline.batch import IGNORED, MicroBatch
from data_pipeline.text import TextWindows
from data_pipeline.windows import BestFit, Stream, Trimmed, counted
from tests.data import write_shard
from tests.data_pipeline.chats import tokenizer
from train.objectives.fim import SENTINELS, FillInTheMiddle
from train.objectives.mlm import MaskedLM

LENGTH = 256
LIMITS = (0, 90, 100, 105, 230, LENGTH)
"""Five documents: two long, one of ten tokens, one of five, one that the window cuts."""


def windows(samples: list[int]) -> MicroBatch:
    """Windows of random text whose content depends on the sample alone; the last document is cut, the first tail is
    padding in every odd sample."""
    text = tokenizer()
    rows = []
    for sample in samples:
        random = torch.Generator().manual_seed(sample)
        tokens_L = torch.randint(len(text.special_ids), text.vocabulary, (LENGTH,), generator=random)
        labels_L, positions_L, documents_L = torch.full((3, LENGTH), IGNORED).unbind()
        for document, (begin, end) in enumerate(pairwise(LIMITS)):
            positions_L[begin:end] = torch.arange(end - begin)
            documents_L[begin:end] = document
            if end < LENGTH:
                tokens_L[end - 1] = text.eos
            labels_L[begin : end - 1] = tokens_L[begin + 1 : end]
        if sample % 2:
            padding = slice(LIMITS[-2], LENGTH)
            tokens_L[padding], labels_L[padding], documents_L[padding] = text.pad, IGNORED, -1
        rows.append((tokens_L, labels_L, positions_L, documents_L, torch.tensor(sample)))
    return MicroBatch(*(torch.stack(column) for column in zip(*rows, strict=True)))


@pytest.mark.parametrize("objective", [MaskedLM(), FillInTheMiddle()], ids=["mlm", "fim"])
def test_a_sample_is_prepared_alike_in_any_micro_batch_and_differently_under_another_seed(objective):
    together = objective.prepare(windows([5, 2, 9]), 7, tokenizer())
    alone = objective.prepare(windows([9]), 7, tokenizer())
    for field in fields(MicroBatch):
        assert torch.equal(getattr(together, field.name)[2:], getattr(alone, field.name)), field.name
    other = objective.prepare(windows([9]), 8, tokenizer())
    assert not torch.equal(other.tokens_BL, alone.tokens_BL)


@pytest.mark.parametrize("objective", [MaskedLM(), FillInTheMiddle(rate=1)], ids=["mlm", "fim"])
def test_the_given_micro_batch_is_left_as_it_was(objective):
    given = windows([4])
    objective.prepare(given, 0, tokenizer())
    assert torch.equal(given.tokens_BL, windows([4]).tokens_BL) and torch.equal(given.labels_BL, windows([4]).labels_BL)


def test_fifteen_percent_are_predicted_of_which_80_are_masked_10_random_10_kept():
    text, given = tokenizer(), windows(list(range(0, 400, 2)))
    batch = MaskedLM().prepare(given, 0, text)
    chosen_BL = batch.labels_BL != IGNORED
    ordinary = int((given.tokens_BL >= len(text.special_ids)).sum())
    share = float(chosen_BL.sum()) / ordinary
    assert share == pytest.approx(0.15, abs=0.01)  # 50,000 positions: five standard deviations are 0.008
    assert torch.equal(batch.labels_BL[chosen_BL], given.tokens_BL[chosen_BL]), "labels are what was there"
    shown, truth = batch.tokens_BL[chosen_BL], given.tokens_BL[chosen_BL]
    masked, kept = (shown == text.special("<|mask|>")).float().mean(), (shown == truth).float().mean()
    assert masked.item() == pytest.approx(0.8, abs=0.03) and kept.item() == pytest.approx(0.1, abs=0.025)
    assert torch.equal(batch.tokens_BL[~chosen_BL], given.tokens_BL[~chosen_BL])


def test_special_tokens_and_padding_are_neither_predicted_nor_put_in():
    text, given = tokenizer(), windows(list(range(50)))
    batch = MaskedLM(rate=0.9).prepare(given, 0, text)
    special_BL = torch.isin(given.tokens_BL, torch.tensor(sorted(text.special_ids)))
    assert (batch.labels_BL[special_BL | (given.documents_BL < 0)] == IGNORED).all()
    added = batch.tokens_BL[batch.tokens_BL != given.tokens_BL]
    allowed = (added == text.special("<|mask|>")) | (added >= len(text.special_ids))
    assert allowed.all()


def test_masked_language_modelling_looks_both_ways():
    assert not MaskedLM.causal and FillInTheMiddle.causal


def restored(tokens: list[int], sentinels: list[int], eos: int) -> tuple[str, list[int]]:
    """How one rearranged document is written, and what it said before."""
    pre, suf, mid = sentinels
    end = [eos] if tokens[-1] == eos else []
    body = tokens[: len(tokens) - len(end)]
    assert body[0] == pre and sorted(t for t in body if t in sentinels) == sorted(sentinels)
    s, m = body.index(suf), body.index(mid)
    if s == 1:
        return "spm", [*body[m + 1 :], *body[2:m], *end]
    return "psm", [*body[1:s], *body[m + 1 :], *body[s + 1 : m], *end]


def test_rearranged_documents_are_the_old_ones_less_three_tokens_in_their_old_place():
    text, given = tokenizer(), windows(list(range(0, 60, 2)))
    batch = FillInTheMiddle(rate=1).prepare(given, 0, text)
    sentinels = [text.special(name) for name in SENTINELS]
    seen = {"psm": 0, "spm": 0}
    for row in range(30):
        for begin, end in pairwise(LIMITS):
            old, new = given.tokens_BL[row, begin:end].tolist(), batch.tokens_BL[row, begin:end].tolist()
            if end - begin == 5:  # one token of text would be left: no three parts
                assert new == old
                continue
            kept = [*old[:-4], text.eos] if old[-1] == text.eos else old[:-3]
            kind, told = restored(new, sentinels, text.eos)
            assert told == kept
            seen[kind] += 1
    assert seen["psm"] > 40 and seen["spm"] > 40
    for name in ("positions_BL", "documents_BL", "samples_B"):
        assert torch.equal(getattr(batch, name), getattr(given, name))


def test_labels_are_the_next_token_of_the_rearranged_document():
    batch = FillInTheMiddle(rate=0.7).prepare(windows(list(range(40))), 0, tokenizer())
    follows_BL = (batch.documents_BL[:, 1:] == batch.documents_BL[:, :-1]) & (batch.documents_BL[:, 1:] >= 0)
    assert torch.equal(batch.labels_BL[:, :-1][follows_BL], batch.tokens_BL[:, 1:][follows_BL])
    assert (batch.labels_BL[:, :-1][~follows_BL] == IGNORED).all(), "nothing is predicted across documents"


LAYOUTS = {
    "stream": Stream,
    "best_fit": lambda shard, length: BestFit(shard, length, "split", counted),
    "cut": lambda shard, length: Trimmed(shard, length, "cut", counted),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_end_of_a_rearranged_document_is_learned_however_windows_are_made(tmp_path, layout):
    text = tokenizer()
    documents = [[*range(20, 20 + n), text.eos] for n in (30, 12, 50, 9, 27, 44)]
    made = LAYOUTS[layout](write_shard(tmp_path / "x", documents), 64)
    given = TextWindows(made, text.vocabulary, text.pad, "x").micro_batch(range(len(made)))
    batch = FillInTheMiddle(rate=1).prepare(given, 0, text)
    assert not torch.equal(batch.tokens_BL, given.tokens_BL)
    ends_BL = given.labels_BL == text.eos
    assert ends_BL.sum() >= 5, "all but one that begins a window"
    assert torch.equal(batch.labels_BL == text.eos, ends_BL)


def test_about_the_given_share_of_documents_is_rearranged_half_of_them_suffix_first():
    text, given = tokenizer(), windows(list(range(0, 1000, 2)))
    batch = FillInTheMiddle(rate=0.3).prepare(given, 1, text)
    pre, suf, _ = (text.special(name) for name in SENTINELS)
    begins = torch.tensor([0, 90, 105, 230])  # of the documents long enough
    moved = batch.tokens_BL[:, begins] == pre
    assert moved.float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert (batch.tokens_BL[:, begins + 1] == suf)[moved].float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_settings_that_cannot_work_are_problems():
    assert [p.key for p in MaskedLM(rate=0).problems(None, 1)] == ["objective.rate"]
    assert [p.key for p in FillInTheMiddle(rate=2, spm_rate=-1).problems(None, 1)] == [
        "objective.rate",
        "objective.spm_rate",
    ]
