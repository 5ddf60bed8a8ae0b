"""Text from a decoder: a key/value cache, batches of prompts of any length, and the usual ways to choose a token.

What a prompt gets depends on the seed and its place in the list, not on how prompts are batched.

Shape suffixes: B sequences, L tokens of the longest prompt, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from conf.errors import LongrunError
from train.models.seeds import derived_seed

if TYPE_CHECKING:
    from data_pipeline.tokenizer import Tokenizer
    from parallel.decode import Decoding
    from train.models.transformer import Decoder

PADDING = -1
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class GenerationError(LongrunError):
    """A prompt or a sampling setting that cannot be served."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop.

    Args:
        max_tokens: most new tokens per prompt; fewer where the model's `max_positions` is reached.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: keep the likeliest tokens that together reach this probability (Holtzman et al. 2020, arXiv:1904.09751);
            in (0, 1], 1 keeps all.
        top_k: keep this many of the likeliest tokens, before top_p; 0 keeps all.
        stop: texts, or names of special tokens, that end the answer and are not part of it. The tokenizer's
            end-of-text token always does.
        seed: of the draws; each prompt has its own stream.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.max_tokens < 1:
            problems.append(f"max_tokens={self.max_tokens}: at least 1")
        if self.temperature < 0:
            problems.append(f"temperature={self.temperature}: 0 for greedy, or above")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p}: in (0, 1]")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k}: 0 for all, or above")
        if "" in self.stop:
            problems.append("stop: an empty text would stop everything")
        if problems:
            raise GenerationError("Sampling settings out of range: " + "; ".join(problems))


def distribution(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """probabilities_BV, fp32, after temperature, top-k and top-p; temperature must be above 0."""
    scores_BV = logits_BV.float() / sampling.temperature
    if 0 < sampling.top_k < scores_BV.shape[-1]:
        lowest_B1 = scores_BV.topk(sampling.top_k).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < lowest_B1, -torch.inf)
    probabilities_BV = scores_BV.softmax(-1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = probabilities_BV.sort(descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV  # the likeliest token always stays
        dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV >= sampling.top_p)
        probabilities_BV = probabilities_BV.masked_fill(dropped_BV, 0.0)
        probabilities_BV = probabilities_BV / probabilities_BV.sum(-1, keepdim=True)
    return probabilities_BV


@dataclass
class _Answer:
    """One prompt's answer while it grows.

    Args:
        tokenizer: decodes it.
        sampling: says when it ends.
        number: place of the prompt in the list.
        prompt: its token ids.
        room: most tokens it may get.
    """

    tokenizer: "Tokenizer"
    sampling: Sampling
    number: int
    prompt: list[int]
    room: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    done: bool = False

    def __post_init__(self) -> None:
        self._draws = torch.Generator().manual_seed(derived_seed(self.sampling.seed, self.number))
        self._ends: list[int] = []  # length of the text after each token
        self._context = self._read = 0  # tokens [context, read) are decoded again, to see how the next ones join
        encoded = [self.tokenizer.encode(stop) for stop in self.sampling.stop]
        self._stop_tokens = {self.tokenizer.eos} | {ids[0] for ids in encoded if len(ids) == 1}

    def draw(self) -> float:
        """The next uniform number in [0, 1)."""
        return torch.rand((), generator=self._draws, dtype=torch.float64).item()

    def push(self, token: int) -> None:
        """Add a token; decide whether the answer ends with it."""
        if token in self._stop_tokens:
            self._finish()
            return
        searched = len(self.text) - max((len(stop) for stop in self.sampling.stop), default=0)
        self.tokens.append(token)
        self._decode()
        self._ends.append(len(self.text))
        hits = [self.text.find(stop, max(0, searched)) for stop in self.sampling.stop]
        if found := [hit for hit in hits if hit >= 0]:
            self.text = self.text[: min(found)]
            self.tokens = [t for t, end in zip(self.tokens, self._ends, strict=True) if end <= min(found)]
            self.done = True
        elif len(self.tokens) >= self.room:
            self._finish()

    def settled(self) -> int:
        """How many characters can no longer turn out to be the beginning of a stop text."""
        if self.done:
            return len(self.text)
        held = 0
        for stop in self.sampling.stop:
            for size in range(min(len(stop) - 1, len(self.text)), 0, -1):
                if self.text.endswith(stop[:size]):
                    held = max(held, size)
                    break
        return len(self.text) - held

    def _decode(self, last: bool = False) -> None:
        before = self.tokenizer.decode(self.tokens[self._context : self._read])
        now = self.tokenizer.decode(self.tokens[self._context :])
        if last or not now.endswith(INCOMPLETE):  # else a character whose other bytes are still to come
            self.text += now[len(before) :]
            self._context, self._read = self._read, len(self.tokens)

    def _finish(self) -> None:
        self._decode(last=True)
        self.done = True


class Generator:
    """Answers prompts with a model.

    Args:
        model: on the device and in the dtype it shall run in; or an engine's `decoding()`, on all its ranks alike.
        tokenizer: the model's.
        batch: most prompts answered together; bounds the memory of the cache.
    """

    def __init__(self, model: "Decoder | Decoding", tokenizer: "Tokenizer", batch: int = 32):
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.device = model.device

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[list[int]]:
        """The new token ids of each prompt, without the token that ended it and those that hold part of a stop text.

        Raises:
            GenerationError: a prompt is empty, or leaves no room within the model's `max_positions`.
        """
        return [answer.tokens for answer in self._answers(prompts, sampling)]

    def complete(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[str]:
        """The text of each answer, up to its stop text; raises as `generate` does."""
        return [answer.text for answer in self._answers(prompts, sampling)]

    def stream(self, prompt: list[int], sampling: Sampling) -> Iterator[str]:
        """The pieces of one answer's text as they are settled; together what `complete` gives; raises likewise."""
        (answer,) = self._started([prompt], sampling)
        shown = 0
        for _ in self._steps([answer]):
            if (settled := answer.settled()) > shown:
                yield answer.text[shown:settled]
                shown = settled

    def _answers(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[_Answer]:
        answers = self._started(prompts, sampling)
        by_length = sorted(answers, key=lambda answer: len(answer.prompt))  # batches with little padding
        for start in range(0, len(by_length), self.batch):
            for _ in self._steps(by_length[start : start + self.batch]):
                pass
        return answers

    def _started(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[_Answer]:
        longest = self.model.config.max_positions
        for number, prompt in enumerate(prompts):
            if not 0 < len(prompt) < longest:
                raise GenerationError(
                    f"Prompt {number} has {len(prompt)} tokens; the model takes 1 to {longest - 1} (max_positions is "
                    f"{longest}) and needs room to answer."
                )
        return [
            _Answer(self.tokenizer, sampling, number, prompt, min(sampling.max_tokens, longest - len(prompt)))
            for number, prompt in enumerate(prompts)
        ]

    @torch.no_grad()  # no inference mode: what a sharded model gathers there could not be trained on afterwards
    def _steps(self, answers: list[_Answer]) -> Iterator[None]:
        """Read the prompts, then add a token to every unfinished answer at each step."""
        length = max(len(answer.prompt) for answer in answers)
        capacity = length + max(answer.room for answer in answers)
        cache = self.model.new_cache(len(answers), capacity)
        pads = [length - len(answer.prompt) for answer in answers]
        tokens_BL = torch.tensor(
            [[0] * pad + a.prompt for pad, a in zip(pads, answers, strict=True)], device=self.device
        )
        positions_BL = torch.arange(length, device=self.device) - torch.tensor(pads, device=self.device)[:, None]
        while True:
            documents_BL = torch.where(positions_BL < 0, PADDING, 0)
            logits_BV = self.model.next_logits(tokens_BL, positions_BL.clamp(min=0), documents_BL, cache)
            chosen = self._choose(logits_BV[:, : self.tokenizer.vocabulary], answers)
            for answer, token in zip(answers, chosen, strict=True):
                if not answer.done:
                    answer.push(token)
            yield
            going = [row for row, answer in enumerate(answers) if not answer.done]
            if not going:
                return
            tokens_BL = torch.tensor(chosen, device=self.device)[:, None]
            positions_BL = positions_BL[:, -1:] + 1
            if 2 * len(going) <= len(answers):  # drop the finished rows, in few copies of the cache
                answers = [answers[row] for row in going]
                going_B = torch.tensor(going, device=self.device)
                tokens_BL, positions_BL = tokens_BL[going_B], positions_BL[going_B]
                cache.keep(going_B)

    def _choose(self, logits_BV: Tensor, answers: list[_Answer]) -> list[int]:
        sampling = answers[0].sampling
        if sampling.temperature == 0:
            return logits_BV.argmax(-1).tolist()
        cumulative_BV = distribution(logits_BV, sampling).double().cumsum(-1)
        draws_B1 = torch.tensor([[answer.draw()] for answer in answers], dtype=torch.float64, device=self.device)
        # The draw is below the total, so that rounding in the sum cannot choose a token of probability 0 at the end.
        return torch.searchsorted(cumulative_BV, draws_B1 * cumulative_BV[:, -1:], right=True).flatten().tolist()
