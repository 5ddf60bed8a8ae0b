"""Artifacts: directories that say what made them.

A stage reads artifacts and writes one. `manifest.json` is written last, so its presence *is* success. The recipe
(kind, configuration, ids of the inputs) decides whether a stage must run again; the id also covers the bytes that
came out, so that everything downstream of a changed file is rebuilt and nothing else is.
"""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from conf.errors import LongrunError, OccupiedError
from data_pipeline.lease import STALE_S, Lease, LiveRunError, flocked

MANIFEST = "manifest.json"
PACKAGES = ("torch", "numpy", "hydra-core", "datatrove", "datasets", "tokenizers", "transformers", "safetensors")


class ArtifactError(LongrunError):
    """An artifact is missing, incomplete, of another kind, or its files are not those that were recorded."""


@dataclass(frozen=True)
class Artifact:
    """What a manifest says.

    Args:
        path: the directory.
        kind: what it holds: "corpus", "chat", "model", "evaluation", "export", ...
        recipe: fingerprint of kind, configuration and input ids.
        id: fingerprint of the recipe and of the files listed in `files`.
        inputs: name -> {"path", "id"} of the artifacts it was made from.
        config: the resolved configuration, without paths and other keys that do not change the result.
        files: relative path -> {"bytes", "sha256"}.
        metrics: numbers of the stage (counts, losses, scores).
        facts: anything else a reader of the lineage wants: code commit, package versions, host.
        started_s: UNIX time at the start, in seconds.
        duration_s: wall time in seconds, summed over restarts where the stage kept count.
    """

    path: Path
    kind: str
    recipe: str
    id: str
    inputs: dict[str, dict[str, str]]
    config: dict[str, Any]
    files: dict[str, dict[str, Any]]
    metrics: dict[str, Any]
    facts: dict[str, Any]
    started_s: float
    duration_s: float

    @classmethod
    def read(cls, path: str | Path, kind: str | None = None) -> "Artifact":
        """Read the manifest of a finished artifact.

        Raises:
            ArtifactError: there is no manifest, it does not parse, or it is of another kind than `kind`.
        """
        path = Path(path)
        try:
            content = json.loads((path / MANIFEST).read_text())
            artifact = cls(path=path, **content)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ArtifactError(
                f"{path} is not a finished artifact: it has no {MANIFEST}. "
                "Give the directory of a stage that ended well, or run that stage first."
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise ArtifactError(
                f"{path / MANIFEST} cannot be read ({error}); delete it and run the stage that wrote it again."
            ) from error
        if kind is not None and artifact.kind != kind:
            raise ArtifactError(f"{path} holds a {artifact.kind!r}, but a {kind!r} was expected here.")
        return artifact

    def damage(self, contents: bool) -> list[str]:
        """Recorded files that are missing or of another size and, where `contents` are read, another checksum."""
        bad = []
        for name, record in self.files.items():
            file = self.path / name
            if not file.is_file():
                bad.append(f"{name}: missing")
            elif file.stat().st_size != record["bytes"]:
                bad.append(f"{name}: {file.stat().st_size} bytes instead of {record['bytes']}")
            elif contents and sha256_of(file) != record["sha256"]:
                bad.append(f"{name}: checksum differs")
        return bad

    def verify(self) -> None:
        """Compare every recorded file with its size and checksum.

        Raises:
            ArtifactError: names each file that is missing or differs.
        """
        bad = self.damage(contents=True)
        if bad:
            raise ArtifactError(f"{self.path} is not what its manifest says:\n  " + "\n  ".join(bad) + "\nRebuild it.")


def sha256_of(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Short stable hash of any JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def recipe_of(kind: str, config: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> str:
    return fingerprint([kind, config, {name: artifact.id for name, artifact in sorted(inputs.items())}])


def finished(path: str | Path, kind: str, config: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> Artifact | None:
    """The artifact at `path` if it was made by exactly this recipe, else None."""
    if not (Path(path) / MANIFEST).exists():
        return None
    artifact = Artifact.read(path)
    return artifact if artifact.recipe == recipe_of(kind, config, inputs) else None


def check_kind(path: str | Path, kind: str) -> None:
    """Refuse a directory that holds something else than what is about to be made anew there.

    Raises:
        OccupiedError: it is an artifact of another kind.
    """
    if (Path(path) / MANIFEST).exists() and (there := Artifact.read(path)).kind != kind:
        raise OccupiedError(
            f"{path} holds a finished {there.kind!r}, and a {kind!r} would be written over it. "
            "Give another run_dir, or move that one away."
        )


def withdraw(path: str | Path, kind: str) -> None:
    """Take away the files of an older artifact of this kind, its manifest first.

    Raises:
        OccupiedError: it is an artifact of another kind.
    """
    check_kind(path, kind)
    manifest = Path(path) / MANIFEST
    if manifest.exists():
        older = Artifact.read(path)
        manifest.unlink()
        for name in older.files:
            (older.path / name).unlink(missing_ok=True)


@dataclass
class Draft:
    """An artifact being made. Fill in `metrics` and `facts`; list the outputs in `publish`."""

    path: Path
    kind: str
    config: dict[str, Any]
    inputs: dict[str, Artifact]
    metrics: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    started_s: float = field(default_factory=time.time)
    earlier_s: float = 0.0

    def publish(self, *patterns: str) -> Artifact:
        """Write the manifest over the files that match `patterns` (globs relative to the directory)."""
        names = sorted({str(f.relative_to(self.path)) for p in patterns for f in self.path.glob(p) if f.is_file()})
        files = {n: {"bytes": (self.path / n).stat().st_size, "sha256": sha256_of(self.path / n)} for n in names}
        recipe = recipe_of(self.kind, self.config, self.inputs)
        artifact = Artifact(
            path=self.path,
            kind=self.kind,
            recipe=recipe,
            id=fingerprint([recipe, files]),
            inputs={name: {"path": os.path.relpath(a.path, self.path), "id": a.id} for name, a in self.inputs.items()},
            config=self.config,
            files=files,
            metrics=self.metrics,
            facts={"commit": code_commit(), "packages": package_versions(), **self.facts},
            started_s=self.started_s,
            duration_s=self.earlier_s + time.time() - self.started_s,
        )
        content = asdict(artifact)
        del content["path"]
        write_atomically(self.path / MANIFEST, json.dumps(content, indent=1, default=str) + "\n")
        return artifact


def write_atomically(file: Path, text: str) -> None:
    """Write, sync, rename: a reader sees the old content or the new one, never a part."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def locked(path: str | Path, stale_s: float = STALE_S) -> Iterator[Lease]:
    """Hold a directory for one writer. The kernel drops its lock when the process ends, however it ends; other machines
    take the lease when it gives no sign any more.

    Args:
        stale_s: seconds after which they do.

    Raises:
        LiveRunError: another process holds it; names the process.
        ArtifactError: it cannot be made, or not be written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        opened = open(path / ".lock", "a+")  # noqa: SIM115  closed below
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be made a directory to write in ({error.strerror}). Is its file system mounted, and not "
            "read-only? Mend that, or give another run_dir."
        ) from error
    with opened as stream:
        try:
            held = flocked(stream, path)
            stream.seek(0)
            if not held:
                raise LiveRunError(
                    f"{path} is being written by {stream.read().strip() or 'another process'}. "
                    "Wait for it, stop it, or give another directory."
                )
            stream.truncate()
            stream.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            stream.flush()
            lease = Lease(path, stale_s)
        except OSError as error:
            raise ArtifactError(
                f"{path} cannot be held ({error.strerror}, errno {error.errno}). Its file system must have room, and "
                "locks of whole files (flock; on Lustre the mount option flock): mend that, or give another run_dir."
            ) from error
        try:
            yield lease
        finally:
            lease.close()


def code_commit() -> str:
    """The commit of the source tree, with "+" when the tree has local changes; "unknown" outside a checkout."""
    here = Path(__file__).parent.parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")


def package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
