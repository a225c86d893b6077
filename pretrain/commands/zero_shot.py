"""The command line of launch/zero_shot.py."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pretrain.commands.exit_codes import run_command
from pretrain.commands.option_types import positive

DESCRIPTION = """\
Compare a bootstrapped student with its teacher on labelled pictures that neither has trained on: how alike they answer,
and how often each is right, zero-shot by sentences about classes (CLIP) or by the inherited head. With --captions: how
well each finds pictures by their captions, and captions by their pictures.
"""
EPILOG = """\
examples:
  python launch/zero_shot.py runs/sparseformer_btsp_openai_clip_base shards/in1k_val --class-names imagenet
  python launch/zero_shot.py runs/mine shards/birds_val --class-names birds.txt --templates sentences.txt
  python launch/zero_shot.py runs/sparseformer_btsp_augreg_base shards/in1k_val
  python launch/zero_shot.py runs/sparseformer_btsp_openai_clip_base shards/coco_val --captions

exit codes: 0 done, 1 failed, 2 wrong usage
"""
#: Metrics as they are called on the screen.
NAMES = {
    "top1": "student, top-1, %",
    "teacher_top1": "teacher, top-1, %",
    "top5": "student, top-5, %",
    "teacher_top5": "teacher, top-5, %",
    "agreement": "both name the same class, %",
    "similarity": "mean cosine of their answers",
    "alignment": "loss",
}
#: Metrics that are no percentages.
FRACTIONS = ("similarity", "alignment")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command("zero_shot", make_parser(), argv, _compare)


def _compare(arguments: argparse.Namespace) -> None:
    import torch

    from pretrain.errors import RecipeError, WeightsError
    from pretrain.objectives.base import problems_of
    from pretrain.objectives.bootstrap import BootstrapObjective, HeldOutPictures
    from pretrain.runtime.process_group import present_ranks
    from pretrain.trained.load_run import load_trained

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(arguments.run)
    objective, recipe = trained.objective, trained.recipe
    if not isinstance(objective, BootstrapObjective):
        raise WeightsError(
            f"{trained.source}: objective {recipe.objective.name} has no teacher beside it; bootstrap has"
        )
    if arguments.captions is not None:
        _retrieve(arguments, trained, device)
        return
    said: HeldOutPictures = recipe.objective.held_out
    words = {key: getattr(arguments, key) for key in ("class_names", "templates", "tokenizer", "text_weights")}
    zero_shot = replace(said.zero_shot, **{key: value for key, value in words.items() if value is not None})
    recipe.objective.held_out = replace(
        said, shards=arguments.shards, micro=arguments.micro, labels=True, zero_shot=zero_shot
    )
    if problems := problems_of(trained.method):
        raise RecipeError(problems)
    evaluation = trained.method.evaluation(present_ranks(device))
    assert evaluation is not None, "shards were given"
    found = evaluation(objective.to(device))
    print(f"{arguments.shards}: {found['pictures']:.0f} pictures, {trained.source}")
    for name in [name for name in NAMES if name in found]:  # no top-5 of fewer classes
        print(f"  {found[name]:9.{4 if name in FRACTIONS else 2}f}  {NAMES[name]}")


def _retrieve(arguments: argparse.Namespace, trained: Any, device: Any) -> None:
    from pretrain.objectives.caption_retrieval import caption_retrieval

    recipe, own = trained.recipe, trained.recipe.objective.held_out
    words = {key: getattr(arguments, key) for key in ("tokenizer", "text_weights") if getattr(arguments, key)}
    recipe.objective.held_out = replace(own, micro=arguments.micro, zero_shot=replace(own.zero_shot, **words))
    found = caption_retrieval(
        trained.objective.to(device), recipe, trained.method.samples(), arguments.shards, arguments.captions, device
    )
    print(f"{arguments.shards}: {found.pictures} pictures, {found.captions} captions, {trained.source}")
    if found.unreadable:
        print(f"  {len(found.unreadable)} pictures can't be used, {found.unreadable[0]}, for example")
    for (who, direction), one in found.scores.items():
        recall = "  ".join(f"R@{place} {value:6.2f} %" for place, value in one.recall.items())
        print(f"  {who}, {direction.replace('_', ' ')}:  {recall}  median rank {one.median_rank:g}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "zero_shot.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder or URL it was uploaded to, checkpoint, or export with recipe.yaml")
    parser.add_argument("shards", help="folder (any fsspec URL) of packed pictures with labels or captions")
    parser.add_argument("--class-names", help="imagenet, or a file with a name a line (default: the run's)")
    parser.add_argument("--templates", help="openai, simple, or a file with a sentence a line (default: the run's)")
    parser.add_argument(
        "--captions", nargs="?", const="", metavar="NAME",
        help="retrieval by captions instead, those of the name among a picture's texts (default: the first text)",
    )  # fmt: skip
    parser.add_argument("--tokenizer", help="clip, or a tokenizer.json (default: the run's)")
    parser.add_argument(
        "--text-weights", help="file or folder with the text tower (default: the run's, or the teacher)"
    )
    parser.add_argument("--micro", type=positive, default=64, help="pictures in one forward pass (default 64)")
    return parser
