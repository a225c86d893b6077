"""The command line of launch/export.py."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.errors import TubeletError

DESCRIPTION = """\
Write the weights of a run for use elsewhere.

  safetensors   DEST/model.safetensors with official key names, and the recipe; what run.init_weights reads
  official      DEST is a .pth file as the official VideoMAE fine-tuning code loads it
  huggingface   DEST/config.json and model.safetensors, for transformers' VideoMAEForPreTraining
"""
EPILOG = """\
examples:
  python launch/export.py runs/vit_b_dual weights/vit_b
  python launch/export.py runs/vit_b_dual weights/vit_b.pth --format official
  python launch/export.py runs/vit_b_dual/checkpoints/step_00100000 weights/vit_b_hf --format huggingface
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        _export(arguments)
    except TubeletError as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    return 0


def _export(arguments: argparse.Namespace) -> None:
    from pretrain.engine.trained import load_trained
    from pretrain.models.export import export_huggingface, export_official, export_safetensors

    trained = load_trained(arguments.run)
    model, dest = trained.objective.model, arguments.dest
    if arguments.format == "official":
        export_official(model, dest)  # type: ignore[arg-type]
    elif arguments.format == "huggingface":
        export_huggingface(model, dest, trained.recipe.objective.normalize_targets)  # type: ignore[arg-type]
    else:
        export_safetensors(model, trained.recipe, dest)  # type: ignore[arg-type]
    parameters = sum(parameter.numel() for parameter in trained.objective.parameters())
    print(f"{trained.source} -> {dest} ({arguments.format}, {parameters:,} parameters)")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "export.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder (its newest checkpoint that verifies) or a checkpoint")
    parser.add_argument("dest", help="where to write: a folder, or a .pth file for official; any fsspec URL")
    formats = ("safetensors", "official", "huggingface")
    parser.add_argument("--format", choices=formats, default="safetensors", help="default safetensors")
    return parser
