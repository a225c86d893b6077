"""Checkpoints of both programs here, written on some ranks or read on others, in one start of processes.

RANK=… WORLD_SIZE=… python layouts_program.py FOLDER [RANKS THAT WROTE, EVERY]
"""

import sys
from pathlib import Path

import torch

from pretrain.runtime.process_group import join, leave
from tests.checkpoint import reshape_program, state_program


def main(folder: Path, source: int = 0, every: int = 1) -> None:
    """Write without a `source`, read with one."""
    ranks = join()
    torch.use_deterministic_algorithms(True)
    if source:
        reshape_program.read(folder / "reshape", ranks, source, every)
        state_program.read(folder / "state", ranks, source)
    else:
        reshape_program.write(folder / "reshape", ranks)
        state_program.write(folder / "state", ranks)
    leave(ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *[int(word) for word in sys.argv[2:]])
