"""Command line of launch/export.py."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pretrain.commands.exit_codes import run_command
from pretrain.errors import RecipeError

if TYPE_CHECKING:
    from pretrain.trained.load_run import Trained

DESCRIPTION = """\
Write the weights of a run, pre-training or fine-tuning, for use elsewhere. Which formats there are says the method;
safetensors always. With another one the error lists them. VideoMAE's and classification's:

  safetensors   DEST/model.safetensors with official key names, recipe.yaml, a model card (README.md) and, fine-tuned,
                classes.txt; what run.init_weights and launch/predict.py read
  official      DEST is a .pth file as the official VideoMAE code loads it
  huggingface   the folder for transformers' VideoMAEForPreTraining or VideoMAEForVideoClassification, with the same
                files beside it
fine-tuned only:
  onnx          DEST is a .onnx file: uint8 clips [B, T, H, W, 3] to logits, B free; needs pip install 'tubelet[onnx]'
  torch_export  DEST is a .pt2 file: the same for torch.export.load
  adapter       DEST is a .safetensors file with what tune.method has trained, for its frozen backbone
"""
EPILOG = """\
examples:
  python launch/export.py runs/vit_b_dual weights/vit_b
  python launch/export.py runs/vit_b_dual/checkpoints/step_00100000 weights/vit_b_hf --format huggingface
  python launch/export.py runs/vit_b_k400 weights/vit_b_k400.onnx --format onnx
  python launch/export.py runs/mine_lora weights/mine.pth --format official --merge

exit codes: 0 done, 1 failed, 2 wrong usage
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command("export", make_parser(), argv, _export)


def _export(arguments: argparse.Namespace) -> None:
    from finetune.recipe import PROGRAMS
    from pretrain.trained.export_run import export_run
    from pretrain.trained.load_run import load_trained

    trained = load_trained(arguments.run, PROGRAMS)
    if arguments.merge:
        trained = _merged(trained)
    remark = export_run(trained, arguments.dest, arguments.format)
    parameters = sum(parameter.numel() for parameter in trained.objective.model.parameters())
    print(f"{trained.source} -> {arguments.dest} ({arguments.format}, {parameters:,} parameters)")
    if remark:
        print(remark)


def _merged(trained: "Trained") -> "Trained":
    """Add low-rank updates to their weights: the same function, whose recipe then says method full."""
    from finetune.adapters.attach import merge
    from finetune.adapters.config import Tune
    from finetune.recipe import TuneRecipe
    from pretrain.objectives.base import method_of

    if not isinstance(trained.recipe, TuneRecipe):
        raise RecipeError(
            f"{trained.source}: --merge is for fine-tuned weights with low-rank updates (tune.method=lora)"
        )
    merge(trained.objective.model)
    return replace(trained, method=method_of(replace(trained.recipe, tune=Tune())))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "export.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", help="run folder (its newest checkpoint that verifies) or URL it was uploaded to, checkpoint, or export"
    )
    parser.add_argument("dest", help="where to write: a folder or a file, as above; any fsspec URL")
    parser.add_argument(
        "--format", default="safetensors", help="one of the above or of the method (default safetensors)"
    )
    parser.add_argument("--merge", action="store_true", help="add low-rank updates (LoRA) to their weights first")
    return parser
