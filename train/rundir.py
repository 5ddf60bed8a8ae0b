"""A run directory: held by one run, of one configuration, and agreed on by all ranks."""

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from conf.errors import LongrunError, OccupiedError
from conf.registry import OPTIONS
from data_pipeline.artifact import MANIFEST, Artifact, write_atomically
from parallel import distributed
from parallel.verdict import spans

if TYPE_CHECKING:
    from train.config import RunConfig

CONFIG = "config.yaml"
IRRELEVANT = (
    "run_dir",
    "name",
    "resume",
    "dry_run",
    "parallel",
    "preflight",
    "engine.cpu",
    "engine.transformer_engine",
    "logger",
    "failures",
    "watching",
    "eval",
    "export",
    "data.path",
    "data.sources.*.path",
    "init_from",
    "stage.compile",
    "stage.checkpoint_every",
    "stage.keep",
    "stage.keep_every",
    "stage.log_every",
    "guard.nonfinite",
    "guard.spike",
    "guard.max_skipped",
    "guard.computation",
    "guard.repeat_every",
    "guard.memory",
    "guard.replicas",
    "guard.every",
    "guard.max_roll_backs",
)
"""Keys that may differ between a run and its continuation: they change where and how it is computed, or name inputs
whose content is compared instead. A * is any name."""

NAMED = ("model", "data", "optim", "schedule", "objective")
"""Groups whose options make different runs."""

ROOMS = ("conf", "data_pipeline", "parallel", "train")
CHANGING = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO", "NVIDIA_TF32_OVERRIDE")
"""Variables that change what is computed, or how it is added up."""
SHOWN = 20
"""Lines of a message that could have hundreds."""


def recipe(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides what a run makes, as flat keys."""
    return {
        key: value
        for key, value in _flat(resolved).items()
        if not any(fnmatchcase(key, name) or fnmatchcase(key, name + ".*") for name in IRRELEVANT)
    }


def with_options(config: "RunConfig", resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration with the name of each group's option, which its values do not tell: two optimizers
    may have the same fields. An option that continues another's runs goes by its name (`continues`)."""
    named = dict(resolved)
    for group in NAMED:
        kind = type(getattr(config, group))
        names = [name for (of, name), option in OPTIONS.items() if of == group and option is kind]
        if names:
            named[group] = {**resolved[group], "option": getattr(kind, "continues", names[0])}
    return named


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def check_same(directory: Path, resolved: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that another configuration began.

    Raises:
        OccupiedError: names each key that differs, with both values.
    """
    file = directory / CONFIG
    if not file.exists():
        return
    stored = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(stored, dict)
    before, now = recipe(stored), recipe(resolved)  # type: ignore[arg-type]
    absent = "absent"
    differing = [
        f"{key}: {before.get(key, absent)!r} there, {now.get(key, absent)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, absent) != now.get(key, absent)
    ]
    if differing:
        raise OccupiedError(
            f"{directory} holds a run of another configuration:\n  " + "\n  ".join(differing) + "\n"
            "Give these keys their values from there to go on with it, or another run_dir to begin anew."
        )


class DisagreementError(LongrunError):
    """The ranks of a run were not started alike."""


def check_agreement(resolved: Mapping[str, Any]) -> None:
    """Refuse ranks that were given other configurations, or run other code: they would train, each another run.

    Raises:
        DisagreementError: names what differs, by rank.
        SystemExit: the same, on all ranks but the first.
    """
    code = {f"code {name}": digest for name, digest in source_digests().items()}
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions |= {name: value for name in CHANGING if (value := os.environ.get(name))}
    differing = distributed.differences(_flat(resolved) | code | versions)
    with together():
        if differing:
            lines = [f"{key}: {_by_rank(having)}" for key, having in differing.items()]
            more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
            raise DisagreementError(
                "the ranks of this run were not started alike:\n  " + "\n  ".join(lines[:SHOWN] + more) + "\n"
                "Give all of them the same command, code and environment."
            )


def _by_rank(having: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{value} on rank {spans(ranks)}" for value, ranks in having.items())


def source_digests() -> dict[str, str]:
    """Of the files that a stage runs, by their paths in the source tree."""
    root = Path(__file__).parent.parent
    files = [file for room in ROOMS for file in sorted((root / room).rglob("*.py"))]
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files}


def check_inputs(directory: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on with a run whose inputs have changed since.

    Raises:
        OccupiedError: names each input that differs.
    """
    differing = [
        f"{name}: {before.get(name, 'none')} then, {now.get(name, 'none')} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise OccupiedError(
            f"{directory} holds a run on other inputs (fingerprints):\n  " + "\n  ".join(differing) + "\n"
            "Put the inputs back to go on with it, or give another run_dir to begin anew."
        )


def check_unfinished(directory: Path, resolved: Mapping[str, Any]) -> None:
    """Refuse to write over a finished artifact that this run would not make.

    Raises:
        OccupiedError: says what it was made from.
    """
    if not (directory / MANIFEST).exists():
        return
    check_same(directory, resolved)
    artifact = Artifact.read(directory)
    made_from = ", ".join(f"{name} {i['id']}" for name, i in artifact.inputs.items()) or "nothing"
    raise OccupiedError(
        f"{directory} holds a finished {artifact.kind!r} made from other inputs ({made_from}). "
        "Give another run_dir, or move that one away."
    )


def write_config(directory: Path, resolved: Mapping[str, Any]) -> None:
    write_atomically(directory / CONFIG, OmegaConf.to_yaml(OmegaConf.create(dict(resolved))))


@contextmanager
def together() -> Iterator[None]:
    """All ranks leave the block well, or all leave the run. For blocks without collectives in them: the error of one
    rank would leave the others waiting at their next one.

    Raises:
        LongrunError: of this rank, if it is the first to have it.
        SystemExit: the error is another rank's, which reports it.
    """
    mine: LongrunError | None = None
    try:
        yield
    except LongrunError as error:
        mine = error
    if dist.is_initialized() and dist.get_world_size() > 1:
        told: list[tuple[str, int] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, (str(mine), mine.exit_code) if mine else None)
        first = next((rank for rank, error in enumerate(told) if error), None)
        if first is not None and first != dist.get_rank():
            others = told[first]
            assert others is not None
            if mine is None or str(mine) == others[0]:
                raise SystemExit(others[1])
    if mine is not None:
        raise mine
