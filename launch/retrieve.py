"""Retrieve sound by video, video by sound, and videos of a class: python launch/retrieve.py --help."""

import sys
from pathlib import Path

if not __package__:  # run as a file
    # Python put launch/ first on sys.path, where pretrain.py hides the package pretrain: the root takes its place.
    root = Path(__file__).resolve().parents[1]
    sys.path[:] = [str(root), *(p for p in sys.path if Path(p or ".").resolve() != root / "launch")]

if __name__ == "__main__":
    from pretrain.commands.retrieve import main

    sys.exit(main())
