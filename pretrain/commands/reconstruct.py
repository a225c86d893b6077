"""The command line of launch/reconstruct.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pretrain.commands.exit_codes import run_command
from pretrain.commands.option_types import positive

DESCRIPTION = """\
Show what a pre-trained model makes of clips that it has not seen: original, masked, reconstructed, and the error over
hidden pixels beside three simple ways to fill them in.
"""
EPILOG = """\
example:
  python launch/reconstruct.py runs/demo .cache/demo/shards/held_out --out reconstruction.png

exit codes: 0 done, 1 failed, 2 wrong usage
"""

#: How each way of filling in is called on the screen.
NAMES = {
    "model": "the model",
    "cube_mean_color": "each cube's own mean colour",
    "mean_color": "mean colour of what is visible",
    "masked_input": "grey, as in the masked input",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command("reconstruct", make_parser(), argv, _reconstruct)


def _reconstruct(arguments: argparse.Namespace) -> None:
    import torch

    from pretrain.checkpoint.restore import local_copy
    from pretrain.runtime.pictures import save_pictures
    from pretrain.trained.load_run import load_trained
    from pretrain.trained.reconstruction import held_out_batches, reconstruction_errors, reconstruction_pictures

    trained = load_trained(arguments.run)
    shown = []
    for shards in arguments.shards:
        batches = list(held_out_batches(trained, shards, arguments.clips))
        errors = reconstruction_errors(trained, batches)
        print(f"{shards}: {sum(len(batch['video']) for batch in batches)} clips, {trained.source}")
        print("  root mean squared error over hidden pixels (1 = black to white), filled in by")
        for name, text in NAMES.items():
            compared = "" if name == "model" else _compared(errors["model"], errors[name])
            print(f"    {errors[name]:.4f}  {text}{compared}")
        shown.append(reconstruction_pictures(trained, batches, arguments.pictures))
    out = arguments.out or local_copy(arguments.run) / "pictures" / "held_out"
    videos = {name: torch.cat([one[name] for one in shown]) for name in shown[0]}
    # It adds .png and .gif itself.
    for path in save_pictures(videos, out.with_suffix(""), arguments.pictures * len(shown)):
        print(f"picture: {path}")


def _compared(model: float, other: float) -> str:
    share = abs(1 - model / other)
    return f" (the model's error is {share:.0%} {'lower' if model < other else 'higher'})"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "reconstruct.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder or URL it was uploaded to, checkpoint, or export with recipe.yaml")
    parser.add_argument(
        "shards", nargs="+", help="folders (any fsspec URL) of packed shards that the run did not train on"
    )
    parser.add_argument("--clips", type=positive, default=64, help="clips of each folder for the errors (default 64)")
    parser.add_argument("--pictures", type=positive, default=4, help="clips of each folder in the picture (default 4)")
    parser.add_argument("--out", type=Path, help="picture to write, .png and .gif (default: RUN/pictures/held_out)")
    return parser
