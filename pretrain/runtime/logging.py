"""Log lines: rank in the format, INFO from rank 0 only, warnings from all, everything into the run folder."""

import logging
import sys
import warnings
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s [rank {rank}] %(name)s: %(message)s"


def set_up_logging(rank: int, folder: Path | None = None) -> None:
    """Log to the console, and to `folder`/rank_00000.log where a folder is given (file: INFO from every rank)."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    formatter = logging.Formatter(FORMAT.format(rank=rank))
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handlers: list[logging.Handler] = [console]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / f"rank_{rank:05d}.log"))
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    _quieten_libraries()


def _quieten_libraries() -> None:
    """DeepSpeed logs each start with a hundred lines of its own, and calls torch functions that warn at every rank."""
    library = logging.getLogger("DeepSpeed")
    library.setLevel(logging.WARNING)
    library.handlers.clear()
    library.propagate = True
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)
