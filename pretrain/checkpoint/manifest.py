"""manifest.json: the files that a checkpoint consists of. Written last, so a folder without one was never finished."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.errors import CheckpointError
from pretrain.runtime.process_group import Ranks, gather_objects
from pretrain.runtime.untrusted import inner_name, parse_json

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class FileEntry:
    """One file: path relative to the checkpoint, size in bytes, sha256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Step (optimiser steps done) and files of a checkpoint."""

    step: int
    files: tuple[FileEntry, ...]

    def to_json(self) -> str:
        """Return the content of manifest.json."""
        content = {"version": VERSION, "step": self.step, "files": [asdict(entry) for entry in self.files]}
        return json.dumps(content, indent=1)


def describe_file(folder: Path, relative: str) -> FileEntry:
    """Measure size and hash of a file as it lies on disk, after making sure that it does."""
    with (folder / relative).open("rb") as file:
        # First on the disk, then in the manifest, which must not promise bytes that a power cut takes.
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(relative, file.tell(), digest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` into `folder` and make it durable."""
    write_durably(folder / MANIFEST, manifest.to_json())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: missing, damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no {MANIFEST}, so the checkpoint was never finished") from error
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable ({type(error).__name__}: {error})") from error
    return parse_manifest(text, str(path))


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Parse the content of a manifest.json found at `where`.

    Raises:
        CheckpointError: damaged, or of another version.
    """
    try:
        content = parse_json(text)
        if content["version"] != VERSION:
            raise CheckpointError(f"{where}: version {content['version']}, this release reads {VERSION}")
        files = tuple(FileEntry(**entry) for entry in content["files"])
        for entry in files:
            # Files are fetched to, and verified at, these places: a manifest of a stranger must not choose others.
            inner_name(entry.path)
        return Manifest(int(content["step"]), files)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: unreadable ({type(error).__name__}: {error})") from error


def problems(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """List the problems of a checkpoint; none where it verifies.

    Sizes of all files are compared, and the hashes of every `parts`-th file from `part` on, so that ranks share the
    reading.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    found = []
    for entry in manifest.files:
        path = folder / entry.path
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            found.append(f"{path}: missing")
        elif size != entry.bytes:
            found.append(f"{path}: {size} bytes instead of {entry.bytes}")
    # A wrong size is reason enough: hashes mean reading everything.
    if not found:
        found = [
            f"{folder / entry.path}: content differs from its sha256"
            for entry in manifest.files[part::parts]
            if describe_file(folder, entry.path) != entry
        ]
    return found


def problems_on_all(ranks: Ranks, folder: Path) -> list[str]:
    """List the problems of a checkpoint that any rank finds; all ranks call it together and share the reading."""
    gathered = gather_objects(ranks, problems(folder, ranks.rank, ranks.world_size))
    return sorted({line for lines in gathered for line in lines})


def write_durably(path: Path, text: str) -> None:
    """Write a small text file: whole or not at all, on disk when this returns."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
