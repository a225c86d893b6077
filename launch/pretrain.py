"""Pre-training: deepspeed launch/pretrain.py --recipe NAME|PATH [key=value ...]"""

import sys
from pathlib import Path

if not __package__:  # run as a file
    # Python put launch/ first on sys.path, where this file hides the package pretrain: the root takes its place.
    root = Path(__file__).resolve().parents[1]
    sys.path[:] = [str(root), *(p for p in sys.path if Path(p or ".").resolve() != root / "launch")]

if __name__ == "__main__":  # spawned data workers read this file again and must stay cheap
    from pretrain.commands.pretrain import main

    sys.exit(main())
