"""Does an export, loaded by transformers in a fresh process, do what the evaluated model does here?

Both sides answer the same questions: ids of texts and of chat prompts, log-probabilities of real texts, greedy
continuations. Ours come from the model that was exported (its weights rounded to the export's dtype), not from the
export, so that a mistake in writing cannot hide behind the same mistake in reading.

Shape suffixes: L tokens of a window, T compared tokens of all windows, V vocabulary.
"""

import inspect
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.errors import LongrunError
from data_pipeline import chat
from data_pipeline.tokenizer import Tokenizer
from train.export import reload
from train.export.source import end_ids
from train.generate import Generator, Sampling
from train.models import hf, hf_weights
from train.models.transformer import Decoder, DecoderConfig

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  Leading spaces,\ttabs\n\n\nand   blank lines  ",
    "x = [i**2 for i in range(1000)]  # 3.14159 + 27",
    "Größe, façade, naïveté; 日本語のテキスト, русский, عربى, 🙂👩‍👩‍👧",
    "\u00e9 is not e\u0301, and a lone \u200d joiner stays",
    "<|endoftext|>end, <|im_start|>user\nhello<|im_end|>",
    "",
)
CONVERSATIONS: tuple[list[chat.Message], ...] = (
    [{"role": "user", "content": "What is 12 + 30?"}],
    [
        {"role": "user", "content": "Repeat:  a\n b "},
        {"role": "assistant", "content": "a b"},
        {"role": "user", "content": "Größe 日本 🙂 once more, please."},
    ],
)
WINDOW = 256
PROMPT = 16
ROUNDING = 4.0
"""How much more than ours their computation in few bits may round: where a sum is kept in fp32 is each library's choice
(transformers on a CPU: 1.1 times ours in bfloat16, 2.5 times in float16)."""


class VerificationError(LongrunError):
    """The export does not do what the model did."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        name: what was compared.
        found: how far the two sides are apart.
        threshold: how far they may be.
        detail: the first difference, or what was measured.
    """

    name: str
    found: float
    threshold: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.found <= self.threshold  # and not so for a NaN


@dataclass(frozen=True)
class Questions:
    """What both sides are asked.

    Args:
        texts: to be tokenised.
        conversations: to be made into prompts; empty where there is no chat template.
        windows: token ids of real texts, whose log-probabilities are compared.
        prompts: token ids to be continued greedily.
        max_tokens: tokens of a continuation.
    """

    texts: list[str]
    conversations: list[list[chat.Message]]
    windows: list[list[int]]
    prompts: list[list[int]]
    max_tokens: int


def questions(tokenizer: Tokenizer, config: DecoderConfig, max_tokens: int) -> Questions:
    """English and code of Python's own library, and texts that tokenisers stumble over, cut to what the model takes."""
    prose = [inspect.getdoc(module) or "" for module in (statistics, textwrap, inspect)]
    code = [inspect.getsource(module)[2000:6000] for module in (statistics, textwrap, inspect)]
    length = min(WINDOW, config.max_positions)
    windows = [tokenizer.encode(text)[:length] for text in (*prose, *code)]
    windows = [window for window in windows if len(window) > 1]
    conversations = list(CONVERSATIONS) if tokenizer.chat_template else []
    prompts = [window[: min(PROMPT, length // 2)] for window in windows]
    prompts += [chat.prompt(tokenizer, messages) for messages in conversations]
    prompts = [prompt for prompt in prompts if len(prompt) + max_tokens <= config.max_positions] or [windows[0][:1]]
    return Questions([*TEXTS, *prose, *code], conversations, windows, prompts, max_tokens)


@dataclass(frozen=True)
class Reference:
    """The model as this program runs it.

    Args:
        model: in fp32, on the device it shall run on.
        tokenizer: its tokenizer.
        ends: tokens that end an answer.
    """

    model: Decoder
    tokenizer: Tokenizer
    ends: list[int]

    @classmethod
    def load(cls, directory: Path, dtype: torch.dtype, device: torch.device) -> "Reference":
        """The model of a Hugging Face directory, its weights rounded to `dtype` and computed with in fp32."""
        config = replace(hf.read_config(directory), attention="sdpa")
        model = hf_weights.decoder(directory, config, device, dtype).float()
        tokenizer = Tokenizer.load(directory)
        return cls(model, tokenizer, end_ids(directory, tokenizer))

    @property
    def device(self) -> torch.device:
        return self.model.head.device

    @torch.inference_mode()
    def logprobs(self, windows: list[list[int]]) -> Tensor:
        """Log-probabilities of every token of the windows but their first, in nats."""
        found = []
        for window in windows:
            tokens_1L = torch.tensor([window], device=self.device)
            positions_1L = torch.arange(len(window) - 1, device=self.device)[None]
            documents_1L = torch.zeros_like(positions_1L)
            found.append(self.model(tokens_1L[:, :-1], positions_1L, documents_1L, tokens_1L[:, 1:])[0].cpu())
        return torch.cat(found)

    @torch.inference_mode()
    def rounded_logprobs(self, windows: list[list[int]], dtype: torch.dtype) -> Tensor:
        """The same with everything computed in `dtype`, the logits included, as engines do that are not told better."""
        with torch.device("meta"):
            model = self.model.config.build(self.model.vocabulary)
        model.load_state_dict(self.model.state_dict(), assign=True)
        model = model.to(dtype).eval()
        found = []
        for window in windows:
            tokens_L = torch.tensor(window, device=self.device)
            positions_1L = torch.arange(len(window), device=self.device)[None]
            logits_LV = model(tokens_L[None], positions_1L, torch.zeros_like(positions_1L))[0, :-1]
            found.append(logits_LV.float().log_softmax(-1).gather(-1, tokens_L[1:, None])[:, 0].cpu())
        return torch.cat(found)

    def continuation(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Greedy tokens, without the one that ended them."""
        stop = tuple(self.tokenizer.decode([end], skip_special=False) for end in self.ends)
        return Generator(self.model, self.tokenizer).generate([prompt], Sampling(max_tokens, stop=stop))[0]

    @torch.inference_mode()
    def gap(self, prefix: list[int], one: int, other: int) -> float:
        """By how much one next token is likelier than another, in nats."""
        tokens_1L = torch.tensor([prefix], device=self.device)
        positions_1L = torch.arange(len(prefix), device=self.device)[None]
        logits_V = self.model(tokens_1L, positions_1L, torch.zeros_like(positions_1L))[0, -1]
        return float(logits_V[one] - logits_V[other])


def compare(reference: Reference, directory: Path, dtype: str, max_tokens: int, tolerance: float) -> list[Check]:
    """Ask both sides and compare; also compare the stored weights with those of the reference.

    Args:
        reference: the model that was exported, rounded to `dtype`.
        directory: the exported Hugging Face directory.
        dtype: of its weights, as torch calls it.
        max_tokens: tokens of each greedy continuation.
        tolerance: largest difference between two log-probabilities in fp32, in nats.

    Raises:
        VerificationError: transformers cannot load the directory.
    """
    asked = questions(reference.tokenizer, reference.model.config, max_tokens)
    theirs = ask_transformers(directory, asked, dtype, reference.device)
    tokenizer = reference.tokenizer
    checks = [
        _weights(reference, directory),
        _loading(theirs["loading"]),
        _same("ids of texts", asked.texts, [tokenizer.encode(text) for text in asked.texts], theirs["text_ids"]),
        _same(
            "ids of chat prompts",
            asked.conversations,
            [chat.prompt(tokenizer, messages) for messages in asked.conversations],
            theirs["chat_ids"],
        ),
        _ends(reference, theirs["end_ids"]),
        _logprobs(reference, asked, theirs["logprobs"], tolerance),
        _continuations(reference, asked, theirs["continuations"], tolerance),
    ]
    if dtype != "float32":
        checks.append(_rounded_logprobs(reference, asked, theirs["rounded_logprobs"], dtype))
    return checks


def ask_transformers(directory: Path, asked: Questions, dtype: str, device: torch.device) -> dict[str, Any]:
    """The answers of a fresh process; see `train/export/reload.py`.

    Raises:
        VerificationError: it failed; shows the end of what it said.
    """
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        request.write_text(json.dumps({**vars(asked), "dtype": dtype, "device": str(device)}), encoding="utf-8")
        command = [sys.executable, "-P", reload.__file__, str(directory.resolve()), str(request), str(answer)]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline}, cwd=scratch)
        if done.returncode != 0:
            last = "\n  ".join(done.stderr.strip().splitlines()[-8:])
            raise VerificationError(f"transformers cannot load or run {directory}:\n  {last}\nExport it again.")
        return json.loads(answer.read_text(encoding="utf-8"))


def _weights(reference: Reference, directory: Path) -> Check:
    stored = hf_weights.read(directory, hf.read_config(directory))
    expected = {name: tensor.cpu() for name, tensor in reference.model.state_dict().items()}
    differing = [name for name in expected if name not in stored or not torch.equal(expected[name], stored[name])]
    return Check("stored weights", len(differing), 0, f"differing: {', '.join(differing[:4])}" if differing else "")


def _loading(loading: dict[str, list[str]]) -> Check:
    """transformers only warns of a tensor it did not find, and fills it with random numbers."""
    told = "; ".join(f"{what}: {', '.join(names[:4])}" for what, names in loading.items())
    return Check("tensors missing or left over in transformers", sum(map(len, loading.values())), 0, told)


def _same(name: str, asked: list[Any], ours: list[list[int]], theirs: list[list[int]]) -> Check:
    differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    if not differing:
        return Check(name, 0, 0, f"{len(asked)} compared")
    i = differing[0]
    at = next((k for k, (a, b) in enumerate(zip(ours[i], theirs[i], strict=False)) if a != b), "the end")
    shown = f"{asked[i]!r}"[:80]
    return Check(name, len(differing), 0, f"{shown} at {at}: ours {ours[i][:12]}, transformers {theirs[i][:12]}")


def _ends(reference: Reference, theirs: list[int]) -> Check:
    missing = [end for end in reference.ends if end not in theirs]
    return Check("tokens that must end an answer and do not", len(missing), 0, f"{reference.ends} expected, {theirs}")


def _logprobs(reference: Reference, asked: Questions, theirs: list[list[float]], tolerance: float) -> Check:
    ours_T = reference.logprobs(asked.windows)
    difference_T = (ours_T - torch.tensor([*itertools.chain.from_iterable(theirs)])).abs()
    detail = f"largest of {len(ours_T)} differences in nats; mean log-probability {float(ours_T.mean()):.4f}"
    return Check("log-probabilities, fp32", float(difference_T.max()), tolerance, detail)


def _rounded_logprobs(reference: Reference, asked: Questions, theirs: list[list[float]], dtype: str) -> Check:
    """Computing in few bits moves log-probabilities: by how much is measured on ours, and theirs may be
    `ROUNDING` times as far."""
    exact_T = reference.logprobs(asked.windows)
    ours_T = reference.rounded_logprobs(asked.windows, getattr(torch, dtype))
    floor = float((ours_T - exact_T).abs().mean())
    found = float((torch.tensor([*itertools.chain.from_iterable(theirs)]) - exact_T).abs().mean())
    detail = f"mean distance to fp32 in nats; ours is {floor:.2g}, and {ROUNDING:g} times that is allowed"
    return Check(f"log-probabilities, {dtype}", found, ROUNDING * floor, detail)


def _continuations(reference: Reference, asked: Questions, theirs: list[list[int]], tolerance: float) -> Check:
    """Equal to the last token, or until two next tokens are as likely within the tolerance."""
    differing, ties, tokens, detail = 0, 0, 0, ""
    for prompt, answer in zip(asked.prompts, theirs, strict=True):
        ours = reference.continuation(prompt, asked.max_tokens)
        end = next((k for k, token in enumerate(answer) if token in reference.ends), len(answer))
        # Ours come without the token that ended them, whichever it was.
        if ours == answer[:end] and (len(ours) < asked.max_tokens) == (end < len(answer)):
            tokens += len(answer)
            continue
        at = next((k for k, (a, b) in enumerate(zip(ours, answer, strict=False)) if a != b), min(len(ours), end))
        mine = ours[at] if at < len(ours) else reference.ends[0]
        other = answer[at] if at < len(answer) else reference.ends[0]
        if mine != other and abs(reference.gap(prompt + answer[:at], mine, other)) <= 2 * tolerance:
            ties += 1
            tokens += at
            continue
        differing += 1
        detail = detail or f"after {at} tokens: ours {ours[at : at + 8]}, transformers {answer[at : at + 8]}; "
    detail += f"{len(theirs)} continuations, {tokens} tokens equal, {ties} ended in a tie"
    return Check("greedy continuations", differing, 0, detail)
