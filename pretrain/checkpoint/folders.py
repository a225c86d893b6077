"""The folder that holds a run's checkpoints: names, what is published, leftovers, which are kept.

    checkpoints/step_00000100/     published; complete if its manifest verifies
    checkpoints/.saving_…/         being written, or left by a kill
    checkpoints/.removing_…/       being removed, or left by a kill
    checkpoints/superseded/        later steps of a run that was taken back to an earlier checkpoint

A file named `keep` inside a checkpoint keeps it for good.
"""

import logging
import re
import shutil
from collections.abc import Set
from pathlib import Path

from pretrain.checkpoint.manifest import sync_folder
from pretrain.runtime.run_folder import RunFolder

logger = logging.getLogger(__name__)

KEEP_FILE = "keep"
_NAME = re.compile(r"step_(\d{8,})")


def folder_of(root: Path, step: int) -> Path:
    """Return the folder that the checkpoint of `step` is published as."""
    return root / f"step_{step:08d}"


def working_folder_of(root: Path, step: int) -> Path:
    """Return the folder that the checkpoint of `step` is written in before it is published."""
    return root / f".saving_step_{step:08d}"


def is_name(name: str) -> bool:
    """Tell whether a published checkpoint may be called so."""
    return _NAME.fullmatch(name) is not None


def step_of(folder: Path) -> int:
    """Read the step of a published checkpoint from its name."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder}: not the name of a checkpoint")
    return int(match[1])


def published(root: Path) -> list[Path]:
    """List folders with a checkpoint's name, oldest step first. They may still be damaged."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)), key=step_of)


def publish(root: Path, step: int) -> Path:
    """Rename the finished working folder of `step` to its public name."""
    target = folder_of(root, step)
    if target.exists():
        # Only a damaged one is written again: a good one would have been resumed from.
        remove(target)
    working_folder_of(root, step).rename(target)
    # Without this a power cut may undo the rename, when retention has already removed older checkpoints.
    sync_folder(root)
    return target


def remove(folder: Path) -> None:
    """Remove a checkpoint; a kill in between never leaves half of it under its public name."""
    doomed = folder.with_name(f".removing_{folder.name}")
    # A removal that was cut short may have left that name, and a folder can't be renamed onto one that is not empty.
    _discard(doomed)
    folder.rename(doomed)
    _discard(doomed)


def _discard(path: Path) -> None:
    """Remove a folder with all in it, or the link or file that somebody put in its place; a link's target stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def clean_leftovers(root: Path) -> list[str]:
    """Remove what killed saves and removals left behind; returns the names."""
    if not root.is_dir():
        return []
    left = [path for path in root.iterdir() if path.name.startswith((".saving_", ".removing_"))]
    for path in left:
        logger.warning("removing %s, left by a killed run", path)
        _discard(path)
    return [path.name for path in left]


def supersede_after(root: Path, step: int) -> None:
    """Move the checkpoints after `step` aside, so that the next start does not continue from them."""
    for folder in published(root):
        if step_of(folder) > step:
            target = root / "superseded" / folder.name
            target.parent.mkdir(exist_ok=True)
            _discard(target)
            folder.rename(target)
            logger.warning("%s moved to %s: the run goes on from step %d", folder.name, target, step)


def retained(steps: list[int], keep_last: int, keep_every_steps: int | None) -> set[int]:
    """Choose the steps whose checkpoints stay: the newest `keep_last`, and the first at or after each multiple.

    Args:
        steps: Steps of all published checkpoints, ascending.
        keep_last: Number of newest ones to keep; at least one always stays.
        keep_every_steps: Keep one for every so many steps for good; None: none.
    """
    kept = set(steps[-max(1, keep_last) :])
    if keep_every_steps:
        # A checkpoint of an earlier stretch that is already gone does no harm: the first of a stretch never goes.
        before = [0, *steps]
        kept |= {
            step for previous, step in zip(before, steps, strict=False) if _stretch(step, previous, keep_every_steps)
        }
    return kept


def _stretch(step: int, previous: int, every: int) -> bool:
    return step // every > previous // every


def apply_retention(
    root: Path, keep_last: int, keep_every_steps: int | None, keep: Set[int] = frozenset()
) -> list[int]:
    """Remove the checkpoints that are neither retained nor in `keep`; returns their steps."""
    folders = {step_of(folder): folder for folder in published(root)}
    kept = retained(sorted(folders), keep_last, keep_every_steps) | keep
    removed = [step for step, folder in folders.items() if step not in kept and not (folder / KEEP_FILE).exists()]
    for step in removed:
        remove(folders[step])
    return removed


def run_of(source: Path) -> Path | None:
    """Find the run folder that a checkpoint lies in; None for one that was copied elsewhere, and for an export."""
    folder = source.resolve()
    inside = folder in published(folder.parent) and folder.parent.name == RunFolder(Path()).checkpoints.name
    return folder.parent.parent if inside else None
