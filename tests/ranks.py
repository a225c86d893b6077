"""Programs that a test starts on several ranks without a launcher."""

import subprocess
import sys
from pathlib import Path


def run_ranks(program: Path, folder: Path, ranks: int) -> None:
    """Run `program FOLDER RANK` for each rank at once; all must end well."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(folder), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)
