"""Our tokens against transformers' tokenizer and megatron-core's reader."""

import json

import numpy as np
import pytest

from data_pipeline.shards import Shard
from data_pipeline.tokenizer import Tokenizer
from tests.data import standard_library, tiny_corpus, tiny_tokenizer


def test_transformers_reads_our_tokenizer_and_makes_the_same_ids(tmp_path):
    from transformers import AutoTokenizer

    ours = tiny_tokenizer()
    ours.save(tmp_path / "ours")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in [*standard_library(10), "<|im_start|>user\né漢😀  \n<|im_end|>", "1234", ""]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos, ours.pad)
    assert theirs.chat_template == ours.chat_template
    theirs.save_pretrained(tmp_path / "theirs")
    back = Tokenizer.load(tmp_path / "theirs")
    assert back.fingerprint == ours.fingerprint
    assert back.chat_template == ours.chat_template


def test_a_foreign_tokenizer_keeps_its_ids_and_its_settings(tmp_path):
    """A tokenizer in the manner of Llama 3: added tokens as objects, a begin-of-text token that the template writes."""
    ours = tiny_tokenizer()
    ours.save(tmp_path)
    config = {"bos_token": {"content": "<|mask|>"}, "eos_token": {"content": "<|im_end|>"}, "model_max_length": 4096}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    foreign = Tokenizer.load(tmp_path)
    assert (foreign.eos, foreign.pad) == (3, 3)
    assert foreign.special_tokens == {"bos_token": "<|mask|>", "eos_token": "<|im_end|>"}
    foreign.save(tmp_path / "again")
    assert json.loads((tmp_path / "again/tokenizer_config.json").read_text())["model_max_length"] == 4096


def test_megatron_core_reads_our_shards(tmp_path):
    reason = "megatron-core is not installed: pip install 'longrun[megatron]'"
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason=reason)
    path = tiny_corpus(tmp_path)
    for split in ("train", "validation", "test"):
        theirs, ours = module.IndexedDataset(str(path / "shards" / split)), Shard(path / "shards" / split)
        assert len(theirs) == ours.documents
        assert np.array_equal(theirs.document_indices, np.arange(ours.documents + 1))
        for i in range(ours.documents):
            assert np.array_equal(theirs[i], ours.document(i))
            assert theirs[i][-1] == 0
