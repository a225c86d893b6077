"""Submit a run to Slurm: python launch/slurm/submit.py --help."""

import sys
from pathlib import Path

if not __package__:  # run as a file
    # Python put launch/slurm/ first on sys.path: the repository's root takes its place.
    root = Path(__file__).resolve().parents[2]
    sys.path[:] = [str(root), *(p for p in sys.path if Path(p or ".").resolve() != root / "launch" / "slurm")]

if __name__ == "__main__":
    from pretrain.commands.submit import main

    sys.exit(main())
