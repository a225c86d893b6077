"""Bringing checkpoints back from an object store, when the local disk has none that is as new and whole."""

import hashlib
import logging
import os
import secrets
from pathlib import Path

from pretrain.checkpoint import folders
from pretrain.checkpoint.manifest import problems_on_all, write_manifest
from pretrain.checkpoint.remote import RemoteCheckpoints
from pretrain.errors import CheckpointError, StorageError, TubeletError
from pretrain.recipe.schema import Checkpoint
from pretrain.runtime import storage
from pretrain.runtime.lease import held
from pretrain.runtime.process_group import Ranks, from_first, gather_objects

logger = logging.getLogger(__name__)

#: File of the run folder by which it is known again; its content is no other folder's.
MARK = ".run_id"

#: Longest time of one look for the run folder in the store, seconds.
APART_S = 30.0

#: Longest time that the download of a checkpoint for a reader of weights may take, seconds.
FETCH_S = 3600.0


def open_remote(options: Checkpoint) -> RemoteCheckpoints | None:
    """Open the place that the recipe uploads checkpoints to; None: nowhere."""
    return RemoteCheckpoints(options.upload, options.upload_deadline_s) if options.upload else None


def prepare_resume(root: Path, options: Checkpoint, ranks: Ranks, resume: str) -> str:
    """Bring what `resume` means from the store to the local disk; returns what it means for `find_checkpoint`.

    Args:
        root: The run's folder of checkpoints.
        options: The recipe's section.
        ranks: This process among all.
        resume: auto, never, or the path or URL of a checkpoint.

    Raises:
        CheckpointError: never, and the store holds checkpoints; or a URL whose checkpoint does not verify.
    """
    if "://" in resume:
        return str(_restore_url(root, resume, options.upload_deadline_s, ranks))
    remote = open_remote(options)
    if remote is not None and ranks.first:
        _set_mark(root.parent)
    if remote is not None and resume == "auto":
        restore_newest(root, remote, ranks)
    elif remote is not None and resume == "never" and (steps := _steps(root, remote, ranks)):
        raise CheckpointError(
            f"--resume never: {remote} holds the checkpoints of steps {steps}; give another checkpoint.upload, or "
            "leave --resume out to continue"
        )
    return resume


def _check_apart(run_dir: Path, remote: RemoteCheckpoints, ranks: Ranks) -> None:
    """Refuse a store that is, holds or lies in the run folder, seen by another way: a mounted bucket, a bind mount.

    Paths can't tell (`recipe/check.py` compares those): the run folder's own mark is looked for in the store.

    Raises:
        CheckpointError: it is found.
    """
    problem = ""
    if ranks.first:
        mark = (run_dir / MARK).read_bytes()
        # Up to three folders deep either way: `<url>/runs/name` in a mounted bucket, and `run/checkpoints/x`.
        above = [storage.join(remote.url, *run_dir.parts[-depth:]) for depth in (3, 2, 1)]
        try:
            if any(_holds(place, mark) for place in [*above, *_up(remote.url, 4)]):
                problem = (
                    f"checkpoint.upload: {remote} is, holds or lies in the run folder {run_dir}, where each upload "
                    "would destroy the checkpoint that it copies; name another place"
                )
        except StorageError as error:
            logger.warning("%s did not answer whether it is the run folder by another way: %s", remote, error)
    if problem := from_first(ranks, problem):
        raise CheckpointError(problem)


def _set_mark(run_dir: Path) -> None:
    """Lay a file of its own into the run folder, once, before stores that cache lists are asked."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if not (run_dir / MARK).is_file():
        (run_dir / MARK).write_text(secrets.token_hex(16), encoding="utf-8")


def _holds(place: str, mark: bytes) -> bool:
    url = storage.join(place, MARK)
    return storage.exists(url, APART_S) and storage.read_bytes(url, deadline_s=APART_S) == mark


def _up(url: str, levels: int) -> list[str]:
    """Return a URL and the folders above it."""
    protocol, separator, path = url.rpartition("://")
    parts = path.rstrip("/").split("/")
    kept = range(len(parts), max(len(parts) - levels, 0), -1)
    return [protocol + separator + "/".join(parts[:count]) for count in kept]


def _restore_url(root: Path, url: str, deadline_s: float, ranks: Ranks) -> Path:
    run, _, name = url.rstrip("/").rpartition("/checkpoints/")
    if not folders.is_name(name):
        raise CheckpointError(f"--resume {url}: allowed is the URL of one checkpoint: …/checkpoints/step_00000100")
    step = folders.step_of(Path(name))
    if not restore(root, RemoteCheckpoints(run, deadline_s), step, ranks):
        raise CheckpointError(f"--resume {url}: can't be restored (see the lines above)")
    return folders.folder_of(root, step)


def restore_newest(root: Path, remote: RemoteCheckpoints, ranks: Ranks) -> None:
    """See to it that the newest checkpoint which verifies, here or at `remote`, lies below `root`.

    All ranks call it together and share the reading. A checkpoint that does not verify at `remote` either is told and
    passed over, as `find_checkpoint` does with local ones.

    Raises:
        CheckpointError: the store does not answer, and there is no local checkpoint to go on with.
    """
    if ranks.first:
        folders.clean_leftovers(root)
    there = _steps(root, remote, ranks)
    here = from_first(ranks, [folders.step_of(folder) for folder in folders.published(root)])
    for step in sorted({*here, *there}, reverse=True):
        if step in here and not problems_on_all(ranks, folders.folder_of(root, step)):
            return
        if step in there and restore(root, remote, step, ranks):
            return


def _steps(root: Path, remote: RemoteCheckpoints, ranks: Ranks) -> list[int]:
    """List the steps at `remote`, found by rank 0 for all."""
    steps: list[int] = []
    problem = ""
    # One answer for all: ranks that see different lists would go into different collectives.
    if ranks.first:
        try:
            steps = remote.steps()
        except StorageError as error:
            problem = str(error)
    steps, problem = from_first(ranks, (steps, problem))
    if not problem:
        _check_apart(root.parent, remote, ranks)
        return steps
    if not from_first(ranks, [folder.name for folder in folders.published(root)]):
        raise CheckpointError(
            f"checkpoint.upload: {remote} can't be listed ({problem}), and {root} holds no checkpoint: this run may "
            "have been going on there. Check the address, the credentials and the network; to start without the "
            "store, set checkpoint.upload=null"
        )
    logger.warning("%s can't be listed, going on with what is on the local disk: %s", remote, problem)
    return []


def restore(root: Path, remote: RemoteCheckpoints, step: int, ranks: Ranks) -> bool:
    """Download the checkpoint of `step` and publish it below `root`; tell whether it verified."""
    folder = folders.working_folder_of(root, step)
    problem = ""
    try:
        manifest = remote.manifest(step)
        remote.fetch(manifest, folder, ranks.rank, ranks.world_size)
    except (TubeletError, OSError) as error:
        problem = str(error)
    wrong = sorted({found for found in gather_objects(ranks, problem) if found})
    if wrong:
        logger.error("%s can't be restored and is passed over: %s", remote.of(step), "; ".join(wrong))
        return False
    if ranks.first:
        write_manifest(folder, manifest)
        folders.publish(root, step)
        logger.warning("checkpoint of step %d restored from %s", step, remote.of(step))
        _restore_records(root.parent, remote)
    # A barrier: nobody may look for the checkpoint before rank 0 has renamed it.
    from_first(ranks, None)
    return True


def _restore_records(run_dir: Path, remote: RemoteCheckpoints) -> None:
    """Restore metrics.jsonl and the like, where the local ones are gone; a run goes on without them."""
    try:
        names = remote.records()
    except StorageError as error:
        logger.warning("the records of the run at %s could not be restored: %s", remote, error)
        return
    for name in names:
        try:
            if not (run_dir / name).exists():
                (run_dir / name).parent.mkdir(exist_ok=True)
                storage.download(storage.join(remote.url, name), str(run_dir / name))
        except (StorageError, OSError) as error:
            logger.warning("%s could not be restored: %s", storage.join(remote.url, name), error)


def local_copy(path: str | Path, cache: Path | None = None) -> Path:
    """Return a local path for readers of weights: `path` itself, or a copy of the uploaded checkpoint that a URL names.

    Args:
        path: A local path; the URL of an uploaded run, which means its newest checkpoint that verifies; the URL of one
            of its checkpoints; or any other URL, which is returned as it is.
        cache: Where copies are kept, and used again while they verify; default: $TUBELET_CACHE, or ~/.cache/tubelet.

    Raises:
        CheckpointError: no checkpoint at the URL verifies.
    """
    url = str(path).rstrip("/")
    if "://" not in url:
        return Path(path)
    run, _, name = url.rpartition("/checkpoints/")
    one = folders.is_name(name)
    if not one and not storage.exists(storage.join(url, "checkpoints")):
        return Path(url)
    remote = RemoteCheckpoints(run if one else url, FETCH_S)
    home = cache or Path(os.environ.get("TUBELET_CACHE", "~/.cache/tubelet")).expanduser()
    place = home / "checkpoints" / hashlib.sha256(remote.url.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    with held(place):  # the ranks of a host ask for the same copy
        return _fetch_newest(remote, [folders.step_of(Path(name))] if one else remote.steps()[::-1], place)


def _fetch_newest(remote: RemoteCheckpoints, steps: list[int], place: Path) -> Path:
    found = []
    for step in steps:
        folder = folders.folder_of(place, step)
        try:
            manifest = remote.manifest(step)
            folder.mkdir(exist_ok=True)
            remote.fetch(manifest, folder)
            write_manifest(folder, manifest)
            return folder
        except TubeletError as error:
            found.append(str(error))
    raise CheckpointError(f"{remote}: no checkpoint that verifies" + "".join(f"\n  {line}" for line in found))
