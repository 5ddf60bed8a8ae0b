import pytest
import torch

from data_pipeline.batch import IGNORED
from data_pipeline.preference import PreferenceData
from data_pipeline.records import EmptySetError, RecordError
from tests.data_pipeline.chats import tokenizer, write_jsonl


def pair(ask: str, chosen: str, rejected: str) -> dict:
    return {
        "prompt": [{"role": "user", "content": ask}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def opened(tmp_path, records, **settings):
    write_jsonl(tmp_path / "preferences_train.jsonl", records)
    return PreferenceData(path=str(tmp_path), **settings).open("train", tokenizer(), 0)


PAIRS = [pair("What is 2 + 2?", "It is 4.", "It is 5. Yes, sir."), pair("The dog?", "Lazy.", "the quick brown fox")]


def test_chosen_come_first_then_rejected_in_the_same_order(tmp_path):
    batch = opened(tmp_path, PAIRS).micro_batch([1, 0])
    text = tokenizer()
    learned = [text.decode(labels_L[labels_L != IGNORED].tolist(), skip_special=False) for labels_L in batch.labels_BL]
    assert learned == [f"{t}<|im_end|>" for t in ("Lazy.", "It is 4.", "the quick brown fox", "It is 5. Yes, sir.")]
    assert batch.samples_B.tolist() == [1, 0, 1, 0] and batch.pairs == 2


def test_padding_is_on_the_right_in_no_document_and_unlabelled(tmp_path):
    batch = opened(tmp_path, PAIRS).micro_batch([0, 1])
    padding_BL = batch.documents_BL == -1
    assert batch.tokens_BL.shape[1] % 32 == 0 and padding_BL.any()
    assert (padding_BL.long().diff(dim=-1) >= 0).all(), "padding only at the end"
    assert (batch.labels_BL[padding_BL] == IGNORED).all()
    assert torch.equal(batch.positions_BL[0][~padding_BL[0]], torch.arange(int((~padding_BL[0]).sum())))


def test_the_reference_is_nan_until_the_objective_has_set_it(tmp_path):
    assert opened(tmp_path, PAIRS).micro_batch([0]).reference_logprobs_B.isnan().all()


def test_assistant_turns_of_the_prompt_are_not_compared(tmp_path):
    record = pair("And the fox?", "Quick.", "Lazy.")
    record["prompt"] = [*PAIRS[0]["prompt"], *PAIRS[0]["chosen"], *record["prompt"]]
    labels_BL = opened(tmp_path, [record]).micro_batch([0]).labels_BL
    assert tokenizer().decode(labels_BL[0][labels_BL[0] != IGNORED].tolist(), skip_special=False) == "Quick.<|im_end|>"


def test_pairs_too_long_are_dropped_or_cut_and_those_cut_alike_dropped(tmp_path):
    long = pair("What?", "fox " * 60 + "Yes", "fox " * 60 + "d'oh")
    differ = pair("What?", "Yes " * 60, "fox " * 60)
    dropped = opened(tmp_path, [*PAIRS, long, differ], sequence_length=64)
    assert dropped.counts == {"pairs": 2, "truncated": 0, "dropped": 2}
    cut = opened(tmp_path, [*PAIRS, long, differ], sequence_length=64, overlong="truncate")
    assert cut.counts == {"pairs": 3, "truncated": 1, "dropped": 1}
    assert cut.micro_batch([2]).tokens_BL.shape == (2, 64)
    with pytest.raises(EmptySetError, match=r"none of 1 pairs fits data\.sequence_length=64"):
        opened(tmp_path, [long], sequence_length=64, overlong="truncate")


def test_bad_pairs_are_reported_together(tmp_path):
    with pytest.raises(RecordError) as caught:
        opened(
            tmp_path,
            [
                PAIRS[0],
                {"prompt": "What?", "chosen": PAIRS[0]["chosen"]},
                pair("What?", "Yes", "Yes"),
                pair("What?", "Yes", "fox") | {"chosen": PAIRS[0]["prompt"]},
            ],
        )
    message = str(caught.value)
    for fault in (
        ':2: prompt is str "What?"; expected a list of messages',
        ":2: rejected is missing",
        ":3: chosen and rejected are equal",
        ":4: chosen has no assistant turn",
    ):
        assert fault in message
