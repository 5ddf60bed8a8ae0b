"""Weights in safetensors files, in and out: each rank reads the block of a tensor that it holds and no more, and no
rank ever has more than one whole tensor to write.

Nothing here imports transformers. Pickled weights are never opened: they can run code.

torch's own HuggingFaceStorageWriter writes every byte twice (each rank's shards, then the first rank copies them
together), and its reader knows neither experts that are stored one by one nor a vocabulary that has grown.

Shape suffixes: V vocabulary, N model width.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from parallel.gather import Gathered, block_of
from parallel.reduce import local_of
from train import tensor_file
from train.models.hf import (
    CONFIG,
    EMBEDDING,
    HEAD,
    HuggingFaceError,
    config_json,
    listed,
    read_json,
    stored_names,
    write_json,
)
from train.models.transformer import Decoder, DecoderConfig

if TYPE_CHECKING:
    from data_pipeline.tokenizer import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = ("F64", "F32", "F16", "BF16")
"""What weights may have."""
ROWS = 4096
"""Rows that are looked at together where a whole embedding is."""


class UnwrittenError(HuggingFaceError):
    """The file system did not take the weights."""


class Weights(Protocol):
    """Where the tensors that are written come from.

    Attributes:
        meta: name -> a tensor of its shape and dtype on the meta device.
    """

    meta: dict[str, Tensor]

    def rows(self, name: str, first: int, last: int, to: int) -> Tensor | None:
        """Rows [first, last) of a tensor on the CPU of rank `to`; all ranks ask together."""
        ...


class Stored:
    """The weights of a Hugging Face directory, checked by the headers of its files; values are read when asked for.

    Args:
        directory: holds `model.safetensors`, or shards with their index.
        config: as `hf.read_config` returned it.

    Attributes:
        meta: every parameter by name, fp32, on the meta device.

    Raises:
        HuggingFaceError: weights are pickled, absent or unreadable, or tensors are missing, unexpected, mis-shaped or
            not floating point; all are listed.
    """

    def __init__(self, directory: str | Path, config: DecoderConfig):
        self.directory = Path(directory)
        self.meta = parameters(config, read_json(self.directory / CONFIG)["vocab_size"])
        self._parts = {name: stored_names(config, name) for name in self.meta}
        self._files: dict[str, Path] = {}
        problems = self._check_headers(config.tied)
        if not problems and config.tied and HEAD in self._files and not self._same(HEAD, EMBEDDING):
            problems.append(f"{HEAD}: differs from {EMBEDDING}, but {CONFIG} says tie_word_embeddings")
        if problems:
            raise HuggingFaceError(
                f"{self.directory} does not hold the weights that its {CONFIG} describes:\n  "
                + "\n  ".join(sorted(problems))
                + "\nCopy the directory again, or mend its configuration."
            )

    def _check_headers(self, tied: bool) -> list[str]:
        expected: dict[str, tuple[int, ...]] = {}
        for name, parts in self._parts.items():
            shape = tuple(self.meta[name].shape)
            expected |= {parts: shape} if isinstance(parts, str) else dict.fromkeys(parts, shape[1:])
        wanted = expected | ({HEAD: expected[EMBEDDING]} if tied else {})  # a copy of the embedding may be there
        problems = []
        for file in _weight_files(self.directory):
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  safe_open is no mapping
                    if name.endswith("rotary_emb.inv_freq"):  # early Llama files stored what the configuration says
                        continue
                    if name in self._files:
                        problems.append(f"{name}: in more than one file, again in {file.name}")
                    self._files[name] = file
                    view = tensors.get_slice(name)
                    shape, dtype = tuple(view.get_shape()), view.get_dtype()
                    if name not in wanted:
                        problems.append(f"{name}: unexpected, of shape {shape}")
                    elif shape != wanted[name]:
                        problems.append(f"{name}: shape {shape}, {wanted[name]} expected")
                    elif dtype not in DTYPES:
                        problems.append(f"{name}: dtype {dtype}, one of {', '.join(DTYPES)} expected")
        return problems + [f"{name}: missing" for name in expected if name not in self._files]

    def _same(self, one: str, other: str) -> bool:
        return all(
            torch.equal(self._read(one, part), self._read(other, part))
            for part in _slices(self.meta[EMBEDDING].shape[0])
        )

    def _read(self, name: str, *where: slice) -> Tensor:
        """Part of a tensor in a file. Each reading opens the file: what it maps into memory is let go at once."""
        with _opened(self._files[name]) as tensors:
            return tensors.get_slice(name)[where]

    def fill(self, out: Tensor, name: str, start: tuple[int, ...]) -> None:
        """Copy the block of a parameter that begins at `start` and has the shape of `out`, in the dtype of `out`."""
        if out.numel() == 0:
            return
        rows, *columns = (slice(s, s + size) for s, size in zip(start, out.shape, strict=True))
        parts = self._parts[name]
        if isinstance(parts, str):
            out.copy_(self._read(parts, rows, *columns))
            return
        for row, part in zip(out, parts[rows], strict=True):
            row.copy_(self._read(part, *columns))

    def rows(self, name: str, first: int, last: int, to: int = 0) -> Tensor:
        """Rows [first, last) of a parameter, in fp32."""
        shape = self.meta[name].shape[1:]
        rows = torch.empty(last - first, *shape)
        self.fill(rows, name, (first, *[0] * len(shape)))
        return rows

    def mean_row(self, name: str) -> Tensor:
        """mean_N of the rows of a matrix, added up in fp64."""
        rows = self.meta[name].shape[0]
        sums = [self.rows(name, part.start, part.stop).sum(0, dtype=torch.float64) for part in _slices(rows)]
        return (torch.stack(sums).sum(0) / rows).float()


def _slices(rows: int) -> list[slice]:
    return [slice(first, min(first + ROWS, rows)) for first in range(0, rows, ROWS)]


def parameters(config: DecoderConfig, vocabulary: int) -> dict[str, Tensor]:
    """Every parameter, and buffer that is kept, by name, on the meta device."""
    with torch.device("meta"):
        return dict(config.build(vocabulary).state_dict())


def read(directory: str | Path, config: DecoderConfig) -> dict[str, Tensor]:
    """Every parameter by name, whole, in fp32; arguments and errors as for `Stored`."""
    stored = Stored(directory, config)
    return {name: stored.rows(name, 0, meta.shape[0]) for name, meta in stored.meta.items()}


@torch.no_grad()
def load(model: nn.Module, directory: str | Path, config: DecoderConfig) -> None:
    """Fill a model: of each parameter, this rank's block is read, and nothing else.

    Where the embedding, and the head if there is one, have more rows than the files, new rows are the mean of the old
    ones, so that the model gives a new token about the probability of an average one and all others keep theirs
    (Hewitt 2021, "Initializing new word embeddings for pretrained language models").

    Args:
        model: all of a `Decoder` or a part of its layers; parameters may be DTensors.
        directory, config: as for `Stored`, which says what is raised.
    """
    stored = Stored(directory, config)
    for buffer in model.buffers():  # those that no file has
        buffer.zero_()
    for name, parameter in model.state_dict(keep_vars=True).items():
        block = block_of(parameter)
        if block is None:  # rows here and there of a vector
            assert isinstance(parameter, DTensor)
            whole = stored.rows(name, 0, parameter.shape[0]).to(parameter.device, parameter.dtype)
            mesh, placements = parameter.device_mesh, parameter.placements
            parameter.copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None))
            continue
        local = local_of(parameter)
        old = min(max(stored.meta[name].shape[0] - block.start[0], 0), local.shape[0])
        stored.fill(local[:old], name, block.start)
        if old < local.shape[0]:
            assert name in (EMBEDDING, HEAD), f"{name}: the model has more rows than its files"
            first = block.start[1]
            local[old:] = stored.mean_row(name)[first : first + local.shape[1]]


def decoder(
    directory: str | Path,
    config: DecoderConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """The model of a directory, whole, in evaluation mode.

    Args:
        directory, config: as for `Stored`, which says what is raised.
        device: where it is built, one tensor at a time.
        dtype: of its parameters.
    """
    with torch.device("meta"):
        model = config.build(read_json(Path(directory) / CONFIG)["vocab_size"])
    model = model.to(dtype).to_empty(device=device)
    load(model, directory, config)
    return model.eval()


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise HuggingFaceError(f"{file} cannot be read ({error}): truncated or damaged. Copy it again.") from error


def _weight_files(directory: Path) -> list[Path]:
    if (directory / INDEX).is_file():
        names = sorted(set(read_json(directory / INDEX).get("weight_map", {}).values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing or not names:
            raise HuggingFaceError(f"{directory / INDEX} names absent files: {listed(missing)}. Copy them too.")
        return [directory / name for name in names]
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    pickles = [f.name for f in directory.iterdir() if f.suffix in PICKLES]
    if pickles:
        raise HuggingFaceError(
            f"{directory} holds its weights as pickle files ({listed(pickles)}). They are refused, unopened: loading "
            f"one can run code. Convert them to {WEIGHTS} where you trust them: "
            "transformers' save_pretrained writes it."
        )
    raise HuggingFaceError(f"{directory} holds no weights: neither {WEIGHTS} nor {INDEX}.")


@dataclass(frozen=True)
class _Piece:
    """A tensor of a file: rows [first, last) of a parameter; as one matrix less, where it is one of a stack.

    Args:
        parameter: its name in the model.
        first, last: the rows.
        meta: shape and dtype in the file.
    """

    parameter: str
    first: int
    last: int
    meta: Tensor


def write(
    directory: str | Path,
    config: DecoderConfig,
    weights: Mapping[str, Tensor],
    tokenizer: "Tokenizer",
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write live tensors; see `write_from`. All ranks call it together.

    Args:
        weights: those of this rank, plain or sharded, in the dtype that shall be written; all ranks' together are
            every parameter.
    """
    write_from(directory, config, Gathered(weights), tokenizer, max_shard_bytes)


def write_from(
    directory: str | Path,
    config: DecoderConfig,
    weights: Weights,
    tokenizer: "Tokenizer",
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a directory that transformers, vLLM and `read` load. `config.json` comes last.

    Files are written front to back under temporary names, one tensor at a time, each file by another rank; they are
    synced, and get their names when all of them are there.

    Args:
        directory: made if need be; weights that are there are replaced.
        config: the architecture.
        weights: every parameter.
        tokenizer: written beside them.
        max_shard_bytes: largest weight file; one tensor is never split.

    Raises:
        HuggingFaceError: tensors are missing, unexpected or mis-shaped, the tokenizer has more tokens than the
            embedding rows, or no Hugging Face architecture has these features together.
        UnwrittenError: there is no room, or the like; on all ranks.
    """
    directory = Path(directory)
    _check(directory, config, weights.meta, tokenizer)
    content = config_json(config, weights.meta[EMBEDDING], tokenizer)
    shards = _shards(config, weights.meta, max_shard_bytes)
    files = [directory / WEIGHTS]
    if len(shards) > 1:
        files = [directory / f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for pattern in (CONFIG, INDEX, "model*.safetensors", ".model*.tmp"):
            for stale in directory.glob(pattern):
                stale.unlink()
    if ranks > 1:
        dist.barrier()
    errors = [
        _write_file(file, shard, weights, writer=number % ranks)
        for number, (file, shard) in enumerate(zip(files, shards, strict=True))
    ]
    needed = sum(piece.meta.nbytes for shard in shards for piece in shard.values())
    _agree(directory, [error for error in errors if error], needed)
    for file in files[rank::ranks]:
        os.replace(_temporary(file), file)
    if ranks > 1:
        dist.barrier()
    if rank == 0:
        if len(shards) > 1:
            index = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
            write_json(directory / INDEX, {"metadata": {"total_size": needed}, "weight_map": index})
        tokenizer.save(directory)
        write_json(directory / CONFIG, content)


def _check(directory: Path, config: DecoderConfig, meta: Mapping[str, Tensor], tokenizer: "Tokenizer") -> None:
    vocabulary = meta[EMBEDDING].shape[0] if EMBEDDING in meta else 0
    expected = parameters(config, vocabulary)
    problems = [f"{name}: missing" for name in expected if name not in meta]
    problems += [f"{name}: unexpected" for name in meta if name not in expected]
    problems += [
        f"{name}: shape {tuple(tensor.shape)}, {tuple(expected[name].shape)} expected"
        for name, tensor in meta.items()
        if name in expected and expected[name].shape != tensor.shape
    ]
    if tokenizer.vocabulary > vocabulary:
        problems.append(f"the tokenizer has {tokenizer.vocabulary} tokens, the embedding {vocabulary} rows")
    if problems:
        raise HuggingFaceError(f"These weights cannot be written to {directory}:\n  " + "\n  ".join(problems))


def _shards(config: DecoderConfig, meta: Mapping[str, Tensor], max_shard_bytes: int) -> list[dict[str, _Piece]]:
    """What each file holds, by name in the file, in the model's order."""
    shards: list[dict[str, _Piece]] = [{}]
    filled = 0
    for name in parameters(config, meta[EMBEDDING].shape[0]):
        parts, tensor = stored_names(config, name), meta[name]
        pieces = {parts: _Piece(name, 0, tensor.shape[0], tensor)} if isinstance(parts, str) else {}
        if not isinstance(parts, str):
            pieces = {part: _Piece(name, row, row + 1, tensor[row]) for row, part in enumerate(parts)}
        for part, piece in pieces.items():
            if shards[-1] and filled + piece.meta.nbytes > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][part] = piece
            filled += piece.meta.nbytes
    return shards


def _write_file(file: Path, shard: Mapping[str, _Piece], weights: Weights, writer: int) -> OSError | None:
    """Write a file, if this rank is its writer. An error is returned at the end: the other ranks would wait for a
    writer that stopped listening."""
    mine = not dist.is_initialized() or dist.get_rank() == writer
    error = (
        _append(file, tensor_file.header({name: (p.meta.dtype, p.meta.shape) for name, p in shard.items()}))
        if mine
        else None
    )
    for piece in shard.values():
        rows = weights.rows(piece.parameter, piece.first, piece.last, writer)
        if rows is not None and error is None:
            error = _append(file, tensor_file.data(rows))
    return _append(file, b"", sync=True) if mine and error is None else error


def _append(file: Path, data: bytes | memoryview, sync: bool = False) -> OSError | None:
    try:
        with open(_temporary(file), "ab") as stream:
            stream.write(data)
            if sync:
                os.fsync(stream.fileno())
    except OSError as error:
        return error
    return None


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name}.tmp")


def _agree(directory: Path, errors: list[OSError], needed: int) -> None:
    """All ranks go on, or all have the error of the first that has one."""
    mine = None
    if errors:
        free = shutil.disk_usage(directory).free
        mine = (
            f"the model was not written to {directory}: {errors[0]}. {needed / 1e6:.1f} MB are needed, "
            f"{free / 1e6:.1f} MB free."
        )
    told = [mine]
    if dist.is_initialized():
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, mine)
    first = next((error for error in told if error), None)
    if first is not None:
        for temporary in directory.glob(".model*.tmp"):
            temporary.unlink(missing_ok=True)
        raise UnwrittenError(first)
