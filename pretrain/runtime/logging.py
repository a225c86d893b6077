"""Log lines: rank in the format, INFO from rank 0 only, warnings from all, everything into the run folder."""

import contextlib
import logging
import logging.handlers
import sys
import warnings
from io import TextIOWrapper
from pathlib import Path

from pretrain.runtime.disk import advice

FORMAT = "%(asctime)s %(levelname)s [rank {rank}] %(name)s: %(message)s"


class RunFileHandler(logging.handlers.WatchedFileHandler):
    """Log file that a full disk does not turn into a traceback for every line; where it is gone, it is made again."""

    def __init__(self, path: Path) -> None:
        # Names of files need not be text; a line about one must not become a traceback.
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._failing = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; the file is opened again first where another, or none, has its name by now."""
        try:
            super().emit(record)
        except OSError:  # of opening it again, which logging does not expect to fail
            self.handleError(record)

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:
        """Tell the first failed write on the console; the lines themselves are there as well."""
        error = sys.exc_info()[1]
        if not self._failing and isinstance(error, OSError):
            # First the flag, then the line: it comes back to this very handler, and would warn of itself for ever.
            self._failing = True
            logging.getLogger(__name__).warning("%s takes no more lines: %s", self.baseFilename, advice(error))
        elif not isinstance(error, OSError):
            super().handleError(record)

    def close(self) -> None:
        """Close; what the disk does not take is lost."""
        with contextlib.suppress(OSError):
            super().close()


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
        handlers.append(RunFileHandler(folder / f"rank_{rank:05d}.log"))
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    _quieten_libraries()


def _quieten_libraries() -> None:
    """Quieten DeepSpeed, which logs a hundred lines at each start and calls torch functions that warn at every rank."""
    library = logging.getLogger("DeepSpeed")
    library.setLevel(logging.WARNING)
    # DeepSpeed gives its logger a handler of its own and no propagation: its warnings would miss the run folder.
    library.handlers.clear()
    library.propagate = True
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)
