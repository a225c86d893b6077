"""The command line of launch/video_text.py."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from pretrain.commands.exit_codes import FAILED, USAGE
from pretrain.errors import RecipeError, TubeletError
from pretrain.runtime.terminal import take_any_name

DESCRIPTION = """\
TVTSv2 as it is: features of video files, retrieval by captions, recognition by sentences about classes, multiple
choice. MODEL is a run, a checkpoint or an export; or with --recipe the file of released weights, or of a CLIP.
"""
EPILOG = """\
examples:
  python launch/video_text.py features MODEL --list videos.txt --out features
  python launch/video_text.py features MODEL --videos film.mp4 --window 10 --hop 5 --frames 16 --out features
  python launch/video_text.py retrieve MODEL shards/msrvtt_1k --dual-softmax
  python launch/video_text.py recognize B_16.pth shards/hmdb51 --recipe vit_b16_tvtsv2 --class-names label2id.json
  python launch/video_text.py choose MODEL ssv2_mc.jsonl videos/

exit codes: 0 done, 1 failed, 2 wrong usage
"""
#: Share of files that may be unreadable, where nothing else is asked for.
MISSING = 0.01


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    take_any_name()
    arguments = make_parser().parse_args(argv)
    try:
        done: int = arguments.do(arguments)
    except TubeletError as error:
        print(f"video_text: {error}", file=sys.stderr)
        return USAGE if isinstance(error, RecipeError) else FAILED
    return done


def _features(arguments: argparse.Namespace) -> int:
    from pretrain.errors import DataError
    from pretrain.trained.video_features import FeatureWindows, extract, listed_files, open_model, write_features

    paths = [*arguments.videos, *(listed_files(arguments.list) if arguments.list else ())]
    if not paths:
        raise DataError("no videos: name some (--videos), or a file with one a line (--list)")
    objective, recipe = open_model(arguments.model, arguments.recipe)
    windows = FeatureWindows(arguments.frames or recipe.input.frames, arguments.window, arguments.hop)
    rows, features, missing = extract(objective, recipe, paths, windows, arguments.normalize, _device())
    return _within_budget(missing, len(paths), arguments) or _written(rows, features, arguments, write_features)


def _written(rows: Any, features: Any, arguments: argparse.Namespace, write: Any) -> int:
    write(rows, features, arguments.out)
    print(f"{arguments.out}: features.safetensors {list(features.shape)}, rows.jsonl")
    return 0


def _measure(arguments: argparse.Namespace) -> int:
    from pretrain.errors import RecipeError
    from pretrain.objectives.tvtsv2_checks import tvtsv2_problems
    from pretrain.objectives.tvtsv2_evaluation import HeldOutClips, VideoTextEvaluation
    from pretrain.runtime.process_group import present_ranks
    from pretrain.trained.video_features import open_model

    objective, recipe = open_model(arguments.model, arguments.recipe)
    said = {name: getattr(arguments, name) for name in ("class_names", "templates", "dual_softmax", "micro")
            if getattr(arguments, name, None) is not None}  # fmt: skip
    recipe.objective.held_out = HeldOutClips(shards=arguments.shards, measure=arguments.measure, **said)
    if problems := tvtsv2_problems(recipe):
        raise RecipeError(problems)
    device = _device()
    for name, value in VideoTextEvaluation(recipe, present_ranks(device))(objective.to(device)).items():
        print(f"  {value:9.2f}  {name}")
    return 0


def _choose(arguments: argparse.Namespace) -> int:
    from pretrain.objectives.multiple_choice import choose, read_questions
    from pretrain.samples.narrated import NarratedClips
    from pretrain.trained.video_features import open_model

    questions = read_questions(arguments.questions, arguments.folder)
    objective, recipe = open_model(arguments.model, arguments.recipe)
    device = _device()
    samples = NarratedClips(recipe.input, recipe.run.seed)
    right, missing = choose(objective.to(device), samples, questions, device)
    print(f"{100 * sum(right) / max(1, len(right)):9.2f}  accuracy, % of {len(right)} videos")
    return _within_budget(missing, len(questions), arguments)


def _within_budget(missing: list[str], count: int, arguments: argparse.Namespace) -> int:
    """Tell what is missing; 1 where that is more than is allowed."""
    if missing:
        print(f"{len(missing)} of {count} videos left out; the first: {missing[0]}", file=sys.stderr)
    if len(missing) > arguments.missing * count:
        print(f"video_text: more than --missing {arguments.missing:g} of them; nothing can be said", file=sys.stderr)
        return 1
    return 0


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "video_text.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="features|retrieve|recognize|choose")

    def add(name: str, text: str, do: Any, **defaults: Any) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        found.set_defaults(do=do, **defaults)
        found.add_argument("model", metavar="MODEL", help="run, checkpoint, export; a file of weights with --recipe")
        found.add_argument("--recipe", help="name or path of the recipe whose model the weights are of")
        return found

    features = add("features", "embeddings of video files", _features)
    # No positional: argparse takes an empty list for it where options stand in front of the files.
    features.add_argument("--videos", nargs="+", default=[], help="files, any URL")
    features.add_argument("--list", help="file with a path or URL a line")
    features.add_argument("--out", required=True, help="folder for features.safetensors and rows.jsonl")
    features.add_argument("--frames", type=int, help="frames of a video or window (default: the recipe's)")
    features.add_argument("--window", type=float, metavar="SECONDS", help="length of windows of a long video")
    features.add_argument("--hop", type=float, metavar="SECONDS", help="from window to window (default: their length)")
    features.add_argument("--normalize", action="store_true", help="divide each by its length, as CLIP's are used")
    retrieve = add("retrieve", "videos by their captions, and back", _measure, measure="retrieval")
    retrieve.add_argument("--dual-softmax", action="store_true", help="weigh by a softmax over queries (DSL)")
    recognize = add("recognize", "classes by sentences, zero-shot", _measure, measure="recognition")
    recognize.add_argument("--class-names", required=True, help="file with a name a line, or label2id.json")
    recognize.add_argument("--templates", help="a sentence with {}, or a file with one a line (default: a person {})")
    for measured in (retrieve, recognize):
        measured.add_argument("shards", help="folder (any URL) of packed videos")
        measured.add_argument("--micro", type=int, help="clips in one forward pass")
    choice = add("choose", "one of a video's own options (SSV2-MC)", _choose)
    choice.add_argument("questions", help="jsonl of clip_name, options, answer")
    choice.add_argument("folder", help="folder (any URL) of the videos")
    for tolerant in (features, choice):
        tolerant.add_argument("--missing", type=float, default=MISSING, help="share of files that may be unreadable")
    return parser
