"""A checkpoint's files: no pickle among them, and no byte of them is written twice.

torch's Distributed Checkpoint (DCP) decides which rank writes which chunk of a tensor, and reads the chunks that any
other layout needs. Its own files hold pickles, in the index and around each tensor. Here a rank's file is a safetensors
file, and the index a JSON object that says where each chunk begins:

    {"model.norm.weight": {"dtype": "F32", "shape": [64], "chunks": [
        {"offsets": [0], "sizes": [32], "file": "rank-00000.safetensors", "begin": 1096}, ...]}, ...}

Bytes are read, not mapped into memory: a disk that fails during a read is an error then, not the end of the process.
"""

import json
import os
import re
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
import torch.futures
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from data_pipeline.artifact import write_atomically
from train import tensor_file
from train.checkpoint.committed import INDEX

BLOCK = 1 << 22
"""Bytes that are written at a time: they are still in the processor's cache when their checksum has been taken."""
FILE = re.compile(r"rank-\d{5,}\.safetensors")


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, and where its bytes are."""

    file: str
    begin: int
    dtype: torch.dtype
    sizes: tuple[int, ...]


class Results(list[WriteResult]):
    """What one rank wrote, with the size and checksum of its file."""

    files: dict[str, dict[str, int]]


class Writer(dcp.StorageWriter):
    """Writes a directory that `Reader` reads.

    DCP calls `write_data` on every rank, gathers the results or the errors of all, and calls `finish` on the first rank
    only if all went well.
    """

    def __init__(self, directory: Path, rank: int):
        self.directory = directory
        self.rank = rank

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """The directory is given once."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.directory.mkdir(exist_ok=True)

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        return plans

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        results = Results()
        results.files = {}
        if plan.items:
            file = self.directory / f"rank-{self.rank:05d}.safetensors"
            with open(file, "wb") as stream:
                checked = _Checked(stream)
                results.extend(_write(checked, file.name, sorted(plan.items, key=_order), planner))
                stream.flush()
                os.fsync(stream.fileno())
                if (size := os.fstat(stream.fileno()).st_size) != checked.bytes:
                    raise OSError(f"{file} has {size} bytes, {checked.bytes} were written")
            results.files[file.name] = {"bytes": checked.bytes, "crc32": checked.crc32}
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks = {result.index: result.storage_data for written in results for result in written}
        write_atomically(self.directory / INDEX, json.dumps(_index(metadata, chunks)))


def _order(item: WriteItem) -> tuple[int, str, tuple[int, ...]]:
    """Wide dtypes first, so that all tensors begin aligned."""
    return -_dtype(item).itemsize, item.index.fqn, _chunk(item)[0]


def _dtype(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
    return item.tensor_data.properties.dtype


def _chunk(item: WriteItem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where in its tensor it begins, and its shape."""
    assert item.tensor_data is not None
    return tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes)


def _name(item: WriteItem) -> str:
    """In the file: of its tensor, and of its place there unless it is all of it."""
    assert item.tensor_data is not None
    offsets, sizes = _chunk(item)
    return item.index.fqn + ("" if sizes == tuple(item.tensor_data.size) else f"@{','.join(map(str, offsets))}")


class _Checked:
    """A file on its way to the disk, with its size and CRC-32 so far."""

    def __init__(self, stream: IO[bytes]):
        self.stream = stream
        self.bytes = self.crc32 = 0

    def write(self, data: bytes | memoryview) -> None:
        for begin in range(0, len(data), BLOCK):
            block = data[begin : begin + BLOCK]
            self.crc32 = zlib.crc32(block, self.crc32)
            self.stream.write(block)
        self.bytes += len(data)


def _write(file: _Checked, name: str, items: list[WriteItem], planner: dcp.SavePlanner) -> list[WriteResult]:
    file.write(tensor_file.header({_name(item): (_dtype(item), _chunk(item)[1]) for item in items}))
    results = []
    for item in items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor)
        chunk = Chunk(name, file.bytes, _dtype(item), _chunk(item)[1])
        results.append(WriteResult(item.index, tensor.nbytes, chunk))
        file.write(tensor_file.data(tensor.cpu()))
    return results


def _index(metadata: Metadata, chunks: dict[MetadataIndex, Chunk]) -> dict[str, Any]:
    content = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        there = [(list(at.offsets), chunks[MetadataIndex(name, at.offsets)]) for at in entry.chunks]
        content[name] = {
            "dtype": tensor_file.NAMES[entry.properties.dtype],
            "shape": list(entry.size),
            "chunks": [
                {"offsets": offsets, "sizes": list(chunk.sizes), "file": chunk.file, "begin": chunk.begin}
                for offsets, chunk in there
            ],
        }
    return content


class Reader(dcp.StorageReader):
    """Reads what `Writer` wrote: of each chunk, the rows that are wanted."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._metadata: Metadata | None = None

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """The directory is given once."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, read once.

        Raises:
            OSError: it cannot be read.
            ValueError, KeyError, TypeError, AttributeError: it is none.
        """
        if self._metadata is None:
            tensors, chunks = {}, {}
            for name, entry in json.loads((self.directory / INDEX).read_text()).items():
                dtype, places = tensor_file.DTYPES[entry["dtype"]], []
                for chunk in entry["chunks"]:
                    if not FILE.fullmatch(chunk["file"]):
                        raise ValueError(f"{name} is said to be in {chunk['file']!r}, which is no file of a checkpoint")
                    offsets, sizes = torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"])
                    places.append(ChunkStorageMetadata(offsets, sizes))
                    chunks[MetadataIndex(name, offsets)] = Chunk(chunk["file"], chunk["begin"], dtype, sizes)
                tensors[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(entry["shape"]), places)
            self._metadata = Metadata(tensors, storage_data=chunks)  # type: ignore[arg-type]
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._metadata = metadata

    def prepare_local_plan(self, plan: dcp.LoadPlan) -> dcp.LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        return plans

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> torch.futures.Future[None]:
        chunks: dict[MetadataIndex, Chunk] = self.read_metadata().storage_data
        of_files: dict[str, list[ReadItem]] = {}
        for item in sorted(plan.items, key=lambda item: chunks[item.storage_index].begin):
            of_files.setdefault(chunks[item.storage_index].file, []).append(item)
        for name, items in of_files.items():
            with open(self.directory / name, "rb", buffering=0) as stream:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_part(stream, chunks[item.storage_index], item))
                    planner.commit_tensor(item, target)
        future: torch.futures.Future[None] = torch.futures.Future()
        future.set_result(None)
        return future


def _part(stream: IO[bytes], chunk: Chunk, item: ReadItem) -> Tensor:
    """What is wanted of a chunk: its rows are read, and cut."""
    first, rows = (item.storage_offsets[0], item.lengths[0]) if chunk.sizes else (0, 1)
    row_bytes = prod(chunk.sizes[1:]) * chunk.dtype.itemsize
    buffer = torch.empty(rows * row_bytes, dtype=torch.uint8)
    stream.seek(chunk.begin + first * row_bytes)
    _fill(buffer.numpy().data, stream)
    part = buffer.view(chunk.dtype).view(rows, *chunk.sizes[1:])
    if not chunk.sizes:
        return part[0]
    for dim in range(1, len(chunk.sizes)):
        part = part.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
    return part


def _fill(buffer: memoryview, stream: IO[bytes]) -> None:
    filled = 0
    while filled < len(buffer):
        count = stream.readinto(buffer[filled:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"{stream.name} ends {len(buffer) - filled} bytes early")
        filled += count
