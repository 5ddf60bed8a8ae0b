"""Training throughput against Hugging Face's Trainer: same weights, tokens, dtype and optimizer, step by step in turn.

The Trainer drives; in its callback after each step the native engine makes the same one. Both are timed from the batch
in memory to the end of the optimizer's step. The machine's matrix-product ceiling is measured between the steps, so the
ratio holds on a machine whose speed varies; the seconds do not.

Shape suffixes: B sequences, L tokens.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from conf.errors import LongrunError
from conf.registry import register
from data_pipeline.batch import IGNORED, MicroBatch
from parallel import distributed
from parallel.engine import Settings
from parallel.engines.native import Native, NativeEngine
from parallel.layout import Layout
from train.models.hf import architecture
from train.models.transformer import DecoderConfig, initialise
from train.objectives.clm import CausalLM
from train.optim.adamw import AdamW

CEILING = 2048
"""Rows of the square product that measures the ceiling."""


class BenchError(LongrunError):
    """A bench cannot be run like this."""


@dataclass
class Course:
    """What one contender did.

    Args:
        seconds: of each step.
        losses: of each step, in nats per token.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@register("bench", "throughput_schema")
@dataclass(frozen=True)
class Throughput:
    """Train a small Llama with Hugging Face's Trainer (eager) and with the native engine (eager and compiled).

    Args:
        model: architecture; any that transformers' Llama has.
        vocabulary: number of token ids.
        batch: sequences of a step.
        sequence_length: tokens of a sequence.
        precision: "bf16" (the Trainer: bf16=True, that is autocast) or "fp32".
        steps: timed steps.
        warm_up: steps before them, in which buffers are made and code is compiled.
        compiled: also run the native engine with compiled blocks.
        trainer_compile: compile the Trainer's model.
        learning_rate: of AdamW, in both.
    """

    model: DecoderConfig = field(default_factory=DecoderConfig)
    vocabulary: int = 8192
    batch: int = 8
    sequence_length: int = 512
    precision: str = "bf16"
    steps: int = 6
    warm_up: int = 2
    compiled: bool = True
    trainer_compile: bool = False
    learning_rate: float = 1e-3

    def run(self) -> dict[str, float]:
        """Measure; returns figures by name, with their unit in it.

        Raises:
            BenchError: the architecture is none that the Trainer's model has.
        """
        if architecture(self.model) != "llama" or self.model.rope.scaling != "default" or self.model.dropout:
            raise BenchError(
                "bench.model: the yardstick is transformers' Llama, without qk_norm, scaled RoPE or dropout."
            )
        contenders = {"ours": self._engine(compile=False)}
        if self.compiled:
            contenders["ours, compiled"] = self._engine(compile=True)
        courses = {name: Course() for name in ("Trainer", *contenders)}
        ceilings: list[float] = []
        self._race(contenders, courses, ceilings)

        tokens = self.batch * self.sequence_length
        gigaflops = self.model.flops_per_token(self.sequence_length, self.vocabulary) * tokens / 1e9
        ceiling = max(ceilings)
        figures = {
            "parameters (M)": self.model.parameter_count(self.vocabulary) / 1e6,
            "matmul ceiling (GF/s)": ceiling,
        }
        yardstick = courses["Trainer"]
        for name, course in courses.items():
            timed = course.seconds[self.warm_up :]
            seconds = statistics.median(timed)
            figures[f"{name}: tokens/s"] = tokens / seconds
            figures[f"{name}: GF/s"] = gigaflops / seconds
            figures[f"{name}: share of the ceiling"] = gigaflops / seconds / ceiling
            figures[f"{name}: last loss (nats)"] = course.losses[-1]
            if course is not yardstick:
                ratios = [a / b for a, b in zip(yardstick.seconds[self.warm_up :], timed, strict=True)]
                differences = [abs(a - b) for a, b in zip(yardstick.losses, course.losses, strict=True)]
                figures[f"{name}: speed / Trainer's, median of steps"] = statistics.median(ratios)
                figures[f"{name}: largest difference of the loss"] = max(differences)
        return figures

    def _engine(self, compile: bool) -> NativeEngine:
        model = self.model.build(self.vocabulary)
        initialise(model, seed=0)
        optimizer = AdamW(lr=self.learning_rate, weight_decay=0.0)
        return Native().build(
            model,
            Layout(),
            optimizer.build,
            world=distributed.start(),
            settings=Settings(precision=self.precision, compile=compile),
        )

    def _race(self, contenders: dict[str, NativeEngine], courses: dict[str, Course], ceilings: list[float]) -> None:
        import transformers

        total = self.warm_up + self.steps
        tokens = [self._tokens(step) for step in range(total)]
        batches, measure_ceiling = [self._micro_batch(tokens_BL) for tokens_BL in tokens], self._ceiling
        start = 0.0

        class Turns(transformers.TrainerCallback):
            """Times the Trainer's step, then lets the others make theirs."""

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                nonlocal start
                start = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                courses["Trainer"].seconds.append(time.perf_counter() - start)
                batch = batches[state.global_step - 1]
                for name, engine in contenders.items():
                    began = time.perf_counter()
                    loss = engine.train_step([batch], CausalLM(), 1.0).loss.item()
                    courses[name].seconds.append(time.perf_counter() - began)
                    courses[name].losses.append(loss)
                ceilings.append(measure_ceiling())

            def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
                if "loss" in given["logs"]:
                    courses["Trainer"].losses.append(float(given["logs"]["loss"]))

        model = self._llama()
        with tempfile.TemporaryDirectory() as directory:
            trainer = transformers.Trainer(
                model=model,
                args=transformers.TrainingArguments(
                    output_dir=directory,
                    use_cpu=not torch.cuda.is_available(),
                    bf16=self.precision == "bf16",
                    torch_compile=self.trainer_compile,
                    per_device_train_batch_size=self.batch,
                    max_steps=total,
                    max_grad_norm=1.0,
                    logging_steps=1,
                    train_sampling_strategy="sequential",
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    dataloader_pin_memory=False,
                ),
                train_dataset=[{"input_ids": row, "labels": row} for step in tokens for row in step],
                optimizers=self._trainer_optimizer(model),
                callbacks=[Turns()],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()

    def _llama(self) -> Any:
        """transformers' model with the weights that the engines start from."""
        import transformers

        shape = self.model
        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            rms_norm_eps=shape.norm_eps,
            tie_word_embeddings=shape.tied,
            attention_bias=shape.qkv_bias,
            mlp_bias=shape.mlp_bias,
            max_position_embeddings=shape.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope.theta},
        )
        model = transformers.LlamaForCausalLM(config)
        ours = shape.build(self.vocabulary)
        initialise(ours, seed=0)
        model.load_state_dict(ours.state_dict(), strict=not shape.tied)
        return model

    def _trainer_optimizer(self, model: Any) -> tuple[Any, Any]:
        like = AdamW(lr=self.learning_rate)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=self.learning_rate,
            betas=(like.beta1, like.beta2),
            eps=like.eps,
            weight_decay=0.0,
            fused=True,
        )
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def _tokens(self, step: int) -> Tensor:
        """tokens_BL of a language that can be learnt: frequent tokens are much more so (Zipf's law)."""
        generator = torch.Generator().manual_seed(step)
        frequency = 1.0 / torch.arange(1, self.vocabulary + 1, dtype=torch.float64)
        drawn = torch.multinomial(frequency, self.batch * self.sequence_length, replacement=True, generator=generator)
        return drawn.view(self.batch, self.sequence_length)

    def _micro_batch(self, tokens_BL: Tensor) -> MicroBatch:
        labels_BL = tokens_BL.roll(-1, dims=1)
        labels_BL[:, -1] = IGNORED
        batch, length = tokens_BL.shape
        return MicroBatch(
            tokens_BL=tokens_BL,
            labels_BL=labels_BL,
            positions_BL=torch.arange(length).expand(batch, length),
            documents_BL=torch.zeros_like(tokens_BL),
            samples_B=torch.arange(batch),
        )

    def _ceiling(self) -> float:
        """GF/s of a large square product in the compute dtype."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        matrix = torch.ones(CEILING, CEILING, dtype=dtype, device=distributed.start().device)
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            product = matrix @ matrix
            product[0, 0].item()
            seconds.append(time.perf_counter() - began)
        return 2 * CEILING**3 / min(seconds) / 1e9
