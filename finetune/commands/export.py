"""The command line of launch/export.py."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.errors import TubeletError, WeightsError

DESCRIPTION = """\
Write the weights of a run, pre-training or fine-tuning, for use elsewhere.

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
"""
#: What DEST must end in, where it is a file of one kind.
SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2", "adapter": ".safetensors"}


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
    from finetune.classification.fine_tuned import is_fine_tuned

    suffix = SUFFIXES.get(arguments.format, "")
    if not arguments.dest.endswith(suffix):
        raise WeightsError(f"{arguments.dest}: --format {arguments.format} writes a file, give one ending in {suffix}")
    write = _fine_tuned if is_fine_tuned(arguments.run) else _pretrained
    source, parameters, remark = write(arguments)
    print(f"{source} -> {arguments.dest} ({arguments.format}, {parameters:,} parameters)")
    if remark:
        print(remark)


def _fine_tuned(arguments: argparse.Namespace) -> tuple[Path, int, str]:
    """Source, parameters, remark."""
    from finetune.classification.exports import write_fine_tuned
    from finetune.classification.fine_tuned import load_fine_tuned, merged

    tuned = load_fine_tuned(arguments.run)
    tuned = merged(tuned) if arguments.merge else tuned
    remark = write_fine_tuned(tuned, arguments.dest, arguments.format)
    return tuned.source, sum(parameter.numel() for parameter in tuned.model.parameters()), remark


def _pretrained(arguments: argparse.Namespace) -> tuple[Path, int, str]:
    """Source, parameters, remark."""
    from pretrain.trained.export_run import FORMATS, write_pretrained
    from pretrain.trained.load_run import load_trained

    if arguments.merge or arguments.format not in FORMATS:
        asked = "--merge" if arguments.merge else f"--format {arguments.format}"
        raise WeightsError(
            f"{arguments.run}: pre-trained weights, and {asked} is for fine-tuned ones; here --format is one of "
            f"{', '.join(FORMATS)}"
        )
    trained = load_trained(arguments.run)
    write_pretrained(trained, arguments.dest, arguments.format)
    return trained.source, sum(parameter.numel() for parameter in trained.objective.parameters()), ""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "export.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", help="run folder (its newest checkpoint that verifies) or URL it was uploaded to, checkpoint, or export"
    )
    parser.add_argument("dest", help="where to write: a folder or a file, as above; any fsspec URL")
    formats = ("safetensors", "official", "huggingface", "onnx", "torch_export", "adapter")
    parser.add_argument("--format", choices=formats, default="safetensors", help="default safetensors")
    parser.add_argument("--merge", action="store_true", help="add low-rank updates (LoRA) to their weights first")
    return parser
