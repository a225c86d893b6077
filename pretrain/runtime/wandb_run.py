"""Weights & Biases: the run's metrics and pictures, offline where there is no key."""

import contextlib
import logging
import os
import re
import secrets
from pathlib import Path
from typing import Any

from pretrain.runtime.disk import Tolerance

logger = logging.getLogger(__name__)

#: Longest time that a start waits for wandb's server, seconds.
START_S = 30.0

RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


class WandbRun:
    """One wandb run, continued under the same id after a resume. Disabled: every call does nothing."""

    def __init__(self, run: Any | None) -> None:
        self._run = run
        self._tolerate = Tolerance()

    def log(self, record: dict[str, Any], step: int) -> None:
        """Send the numbers of one step."""
        if self._run is not None:
            # Its background process may be gone, which it tells by errors of many kinds; the numbers are ours as well.
            with self._tolerate("wandb's record", Exception):
                self._run.log({key: value for key, value in record.items() if "/" in key}, step=step)

    def log_pictures(self, paths: list[Path], step: int) -> None:
        """Send picture files; GIFs move in the browser."""
        if self._run is None:
            return
        with self._tolerate("wandb's pictures", Exception):
            self._send(paths, step)

    def _send(self, paths: list[Path], step: int) -> None:
        import wandb

        assert self._run is not None
        media = {path.suffix: _moving(path) if path.suffix == ".gif" else wandb.Image(str(path)) for path in paths}
        self._run.log({f"pictures/{suffix[1:]}": medium for suffix, medium in media.items()}, step=step)

    def close(self, exit_code: int) -> None:
        """Finish the run; a stopped one (75) is marked as preempted, to be continued."""
        if self._run is not None:
            with self._tolerate("wandb's end", Exception):
                self._run.finish(exit_code=exit_code)


def wandb_mode(setting: str, environ: Any = os.environ) -> str:
    """Resolve `setting`: online, offline or disabled; `auto`: online with a key (environment, netrc), else offline."""
    if setting != "auto":
        return setting
    if "WANDB_MODE" in environ:
        return str(environ["WANDB_MODE"])
    if environ.get("WANDB_API_KEY"):
        return "online"
    netrc = Path(environ.get("NETRC", "~/.netrc")).expanduser()
    return "online" if netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="replace") else "offline"


def _moving(path: Path) -> Any:
    import wandb

    return wandb.Video(str(path), format="gif")


def open_wandb(setting: str, project: str, name: str, run_dir: Path, config: dict[str, Any]) -> WandbRun:
    """Start or continue the run's wandb run; its id is kept in the run folder.

    Nothing that goes wrong here keeps a run from training: what can't be sent is written offline, what can't be written
    is left out, with one line each.
    """
    mode = wandb_mode(setting)
    if mode == "disabled":
        return WandbRun(None)
    run_id = _run_id(run_dir / "wandb_id")
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            run = WandbRun(_start(attempt, project, name, run_id, run_dir, config))
        except Exception as error:  # of many kinds, its own and those of the network and the disk
            logger.warning("wandb: %s run could not be started: %s: %s", attempt, type(error).__name__, error)
            _forget()
            continue
        logger.info("wandb: %s, project %s", attempt, project)
        if attempt != mode:
            logger.warning("wandb: this start is logged offline; send it later with: wandb sync %s/wandb/*", run_dir)
        return run
    logger.warning("wandb: nothing is logged there; all numbers are in %s", run_dir / "metrics.jsonl")
    return WandbRun(None)


def _start(mode: str, project: str, name: str, run_id: str, run_dir: Path, config: dict[str, Any]) -> Any:
    import wandb

    return wandb.init(
        project=project,
        name=name,
        id=run_id,
        resume="allow" if mode == "online" else None,
        dir=str(run_dir),
        mode=mode,  # type: ignore[arg-type]
        config=config,
        settings=wandb.Settings(silent=True, console="off", init_timeout=START_S),
    )


def _forget() -> None:
    """End wandb's background process, which holds the id of a run that could not be started."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def _run_id(path: Path) -> str:
    """Read the id of the run, or draw one where there is none that can be used."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = path.read_text(encoding="utf-8").strip()
        if RUN_ID.fullmatch(found):
            return found
        logger.warning("%s: %.40r is no id of a wandb run (damaged?); wandb begins another run", path, found)
    drawn = secrets.token_hex(4)
    with Tolerance()(str(path)):
        path.write_text(drawn, encoding="utf-8")
    return drawn
