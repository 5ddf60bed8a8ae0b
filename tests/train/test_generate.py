"""Generation: the cache, ragged batches, sampling, stopping, streaming."""

from dataclasses import replace

import pytest
import torch

from train.generate import GenerationError, Generator, Sampling, distribution
from train.models.cache import Cache
from train.models.transformer import Decoder, DecoderConfig, initialise

CONFIG = DecoderConfig(layers=2, hidden=32, intermediate=48, heads=4, kv_heads=2, head_dim=8, max_positions=64)
PROMPTS = [list(b"a longer prompt"), list(b"x"), list(b"three"), list(b"another long prompt")]


class Bytes:
    """A tokenizer of bytes, with two special tokens."""

    vocabulary, eos, pad = 258, 256, 257

    def encode(self, text: str) -> list[int]:
        return [257] if text == "<end>" else list(text.encode())

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = CONFIG.build(300)  # more rows than the tokenizer has tokens, as padded models have
    initialise(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


class Script:
    """In a decoder's place: says given texts, byte by byte, whatever the prompt."""

    def __init__(self, *texts: bytes | list[int]):
        self.config = replace(CONFIG, layers=0)
        self.device = torch.device("cpu")
        self.texts, self.step = [list(text) for text in texts], 0

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return Cache(0, batch, capacity, self.device)

    def next_logits(self, tokens_BL: torch.Tensor, *_: object) -> torch.Tensor:
        said = torch.tensor([text[self.step] if self.step < len(text) else 256 for text in self.texts])
        self.step += 1
        return torch.nn.functional.one_hot(said, 258).float()


@torch.no_grad()
def greedy(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """Without a cache: the whole sequence is read for every token."""
    ids = list(prompt)
    for _ in range(count):
        tokens_BL = torch.tensor([ids])
        logits_BLV = model(tokens_BL, torch.arange(len(ids))[None], torch.zeros_like(tokens_BL))
        ids.append(int(logits_BLV[0, -1, : Bytes.vocabulary].argmax()))
    return ids[len(prompt) :]


def test_the_cache_and_ragged_batches_change_nothing(model):
    answers = Generator(model, Bytes()).generate(PROMPTS, Sampling(max_tokens=20))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = greedy(model, prompt, 20)
        assert answer == (expected[: expected.index(256)] if 256 in expected else expected)


def test_a_long_prompt_goes_on_alone_after_a_short_one_ends(model):
    short, long = PROMPTS[1], PROMPTS[0]
    expected = [greedy(model, prompt, 20) for prompt in (short, long)]
    stop = next(token for token in expected[0][1:] if token not in expected[1])

    class Ends(Bytes):
        eos = stop

    answers = Generator(model, Ends()).generate([short, long], Sampling(max_tokens=20))
    assert answers == [expected[0][: expected[0].index(stop)], expected[1]]


def test_an_answer_depends_on_seed_and_place_not_on_its_batch(model):
    sampling = Sampling(max_tokens=20, temperature=1.0, top_p=0.9, seed=5)
    together = Generator(model, Bytes()).generate(PROMPTS, sampling)
    assert together == Generator(model, Bytes(), batch=1).generate(PROMPTS, sampling)
    assert together == Generator(model, Bytes()).generate(PROMPTS, sampling)
    assert together != Generator(model, Bytes()).generate(PROMPTS, replace(sampling, seed=6))
    twice = Generator(model, Bytes()).generate([PROMPTS[0], PROMPTS[0]], sampling)
    assert twice[0] == together[0] != twice[1]


def test_the_global_generator_is_left_alone(model):
    state = torch.get_rng_state()
    Generator(model, Bytes()).generate(PROMPTS[:1], Sampling(max_tokens=3, temperature=1.0))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_the_whole_answer_in_pieces(model, temperature):
    generator, sampling = Generator(model, Bytes()), Sampling(max_tokens=25, temperature=temperature, stop=("e",))
    pieces = list(generator.stream(PROMPTS[0], sampling))
    assert "".join(pieces) == generator.complete(PROMPTS[:1], sampling)[0]


def test_a_stop_text_across_tokens_ends_the_answer_and_is_not_shown():
    generator = Generator(Script(b"one. STOP two"), Bytes())
    pieces = list(generator.stream([1], Sampling(stop=("STOP",))))
    assert "".join(pieces) == "one. "
    assert not any("S" in piece for piece in pieces)
    generator = Generator(Script(b"one. STOP two"), Bytes())
    assert generator.generate([[1]], Sampling(stop=("STOP",))) == [list(b"one. ")]


def test_the_beginning_of_a_stop_text_that_does_not_go_on_is_shown():
    assert "".join(Generator(Script(b"STOOL STO"), Bytes()).stream([1], Sampling(stop=("STOP",)))) == "STOOL STO"


def test_the_earliest_of_several_stop_texts_counts():
    assert Generator(Script(b"ab cd ef"), Bytes()).complete([[1]], Sampling(stop=("d e", "b c", "ef"))) == ["a"]


@pytest.mark.parametrize("stop", [(), ("<end>",)])
def test_special_tokens_end_the_answer(stop):
    generator = Generator(Script([*b"hi", 257 if stop else 256, *b"more"]), Bytes())
    assert generator.generate([[1]], Sampling(stop=stop)) == [list(b"hi")]


def test_rows_that_finish_early_leave_the_others_alone():
    texts = [b"a", b"bb" * 9, b"c", b"", b"dd" * 4]

    class Rows(Script):
        """Follows its rows by their prompt."""

        def next_logits(self, tokens_BL, positions_BL, documents_BL, cache):
            cache.see(documents_BL)
            if self.step == 0:
                self.rows = [int(t) for t in tokens_BL[:, -1]]
            elif len(self.rows) != len(tokens_BL):
                self.rows = [r for r in self.rows if len(texts[r]) >= self.step][: len(tokens_BL)]
            self.texts = [list(texts[r]) for r in self.rows]
            return super().next_logits(tokens_BL)

    answers = Generator(Rows(*texts), Bytes()).generate([[n] for n in range(5)], Sampling())
    assert answers == [list(text) for text in texts]


def test_a_character_of_several_bytes_is_shown_once_it_is_whole():
    pieces = list(Generator(Script("aé→😀".encode()), Bytes()).stream([1], Sampling()))
    assert pieces == ["a", "é", "→", "😀"]


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    assert Generator(Script(b"a\xf0\x9f"), Bytes()).complete([[1]], Sampling()) == ["a\N{REPLACEMENT CHARACTER}"]


def test_temperature_zero_takes_the_likeliest(model):
    cold = Generator(model, Bytes()).generate(PROMPTS, Sampling(max_tokens=8))
    assert cold == Generator(model, Bytes()).generate(PROMPTS, Sampling(max_tokens=8, temperature=1.0, top_k=1))
    assert cold == Generator(model, Bytes()).generate(PROMPTS, Sampling(max_tokens=8, temperature=1.0, top_p=1e-6))


def test_draws_follow_the_distribution():
    logits_BV = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    sampling = Sampling(temperature=0.7, top_k=3, top_p=0.95)
    expected_V = distribution(logits_BV, sampling)[0]
    generator = Generator(Script(b""), Bytes())
    (answer,) = generator._started([[1]], sampling)
    drawn = torch.tensor([generator._choose(logits_BV, [answer])[0] for _ in range(4000)])
    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / 4000, expected_V, rtol=0, atol=0.03)
    assert expected_V[3] == 0


def test_answers_end_at_the_longest_context(model):
    prompt = list(range(1, 61))
    assert len(Generator(model, Bytes()).generate([prompt], Sampling(max_tokens=100))[0]) <= 4


@pytest.mark.parametrize("prompt", [[], list(range(64))])
def test_a_prompt_that_leaves_no_room_is_refused_by_number(model, prompt):
    with pytest.raises(GenerationError, match=rf"Prompt 1 has {len(prompt)} tokens; the model takes 1 to 63"):
        Generator(model, Bytes()).generate([[1], prompt], Sampling())


def test_settings_out_of_range_are_listed_at_once():
    with pytest.raises(GenerationError) as caught:
        Sampling(max_tokens=0, temperature=-1, top_p=0, top_k=-1, stop=("",))
    assert all(name in str(caught.value) for name in ("max_tokens=0", "temperature=-1", "top_p=0", "top_k=-1", "stop"))
