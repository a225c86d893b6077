"""The command line of launch/plan.py."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pretrain.commands.option_types import positive
from pretrain.errors import RecipeError, TubeletError
from pretrain.plan.feeding import DECODE_MS, VIEW_MS, Resources
from pretrain.runtime.terminal import take_any_name

DESCRIPTION = """\
What a run will need and take, before it is paid for: FLOPs, bytes and memory by part, the largest micro-batch that
fits, communication, the time of a step as a roofline gives it, cores and bandwidth that feed it, hours of the recipe.
"""
EPILOG = """\
examples:
  python launch/plan.py --recipe vit_g_dual --gpus 64 --gpu h100
  python launch/plan.py --recipe vit_g_dual --gpu a100 --sweep gpus=8,16,32,64,128 --plot scaling.png
  python launch/plan.py --recipe vit_b_dual --gpu h100 --rates bench/results/gpu/rates.json compute.compile=true
  python launch/plan.py --recipe demo --gpus 2 --gpu here

exit codes: 0 done, 1 failed, 2 wrong recipe or usage
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    take_any_name()
    try:
        arguments = make_parser().parse_intermixed_args(argv)
        return _plan(arguments)
    except RecipeError as error:
        print("plan: " + "\n  - ".join(error.problems), file=sys.stderr)
        return 2
    except TubeletError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 1


def _plan(arguments: argparse.Namespace) -> int:
    # Here and not above: they load torch, and --help and a wrong option answer without it.
    from pretrain.commands.program import print_sections
    from pretrain.objectives.base import method_of, problems_of
    from pretrain.plan.estimate import Planner
    from pretrain.plan.hardware import find_gpu
    from pretrain.plan.indices import epoch_of, find_indices
    from pretrain.plan.recomputation import recomputation_advice
    from pretrain.plan.tables import as_json, draw, sections, sweep_section
    from pretrain.recipe.load import load_recipe

    method = method_of(load_recipe(arguments.recipe, arguments.overrides))
    recipe, problems = method.recipe, problems_of(method)
    if problems:
        raise RecipeError(problems)
    counts = _sweep(arguments.sweep) if arguments.sweep else [arguments.gpus or recipe.batch.ranks or 8]
    resources = Resources(arguments.decode_ms, arguments.view_ms, arguments.cores, arguments.store_gbs)
    # Sources that are not there are no error: a run is planned before its data is packed.
    found, _ = find_indices(recipe)
    epoch = epoch_of(recipe, found)
    indices = [index for index in found.values() if index is not None]
    planner = Planner(method, find_gpu(arguments.gpu, arguments.rates), resources, indices, epoch[1] if epoch else None)
    plans = [planner.estimate(count) for count in counts]
    if arguments.recomputation:
        plans = [replace(plan, problems=plan.problems + recomputation_advice(planner, plan)) for plan in plans]
    if arguments.json:
        content = [as_json(plan) for plan in plans]
        arguments.json.write_text(json.dumps(content if arguments.sweep else content[0], indent=1), encoding="utf-8")
    print_sections([sweep_section(plans)] if arguments.sweep else sections(recipe, plans[0], resources))
    if arguments.plot:
        draw(plans, arguments.plot)
        print(f"plot: {arguments.plot}")
    return 0


def _sweep(text: str) -> list[int]:
    """Read `gpus=8,16,…,1024` as numbers; an ellipsis goes on doubling."""
    name, _, values = text.partition("=")
    words = values.replace("...", "…").split(",")
    try:
        if name != "gpus":
            raise ValueError
        if "…" in words:
            at = words.index("…")
            first, last = [int(word) for word in words[:at]], int(words[at + 1])
            while first[-1] * 2 <= last:
                first.append(first[-1] * 2)
            return first
        return [int(word) for word in words]
    except (ValueError, IndexError):
        raise RecipeError(f"--sweep: found {text}; allowed is gpus=8,16,32 or gpus=8,16,…,1024 (doubling)") from None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "plan.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", required=True, metavar="NAME|PATH", help="a file of recipes/ by name, or a path")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a value of the recipe")
    parser.add_argument("--gpus", type=positive, help="accelerators (default: the recipe's batch.ranks, or 8)")
    parser.add_argument("--gpu", default="h100", help="v100, a100-40, a100, l40s, h100, h200, b200, or here: measured")
    parser.add_argument("--rates", type=Path, help="JSON with measured rates, as `bench/gpu.py rates` writes")
    parser.add_argument("--recomputation", action="store_true", help="say whether recomputing less fits and pays")
    parser.add_argument("--sweep", metavar="gpus=8,16,…", help="one line for each number of accelerators")
    parser.add_argument("--decode-ms", type=float, default=DECODE_MS, help="a core's time for a clip (bench/loader.py)")
    parser.add_argument("--view-ms", type=float, default=VIEW_MS, help="and for each further view of it")
    parser.add_argument("--cores", type=float, default=12.0, help="cores there are for each accelerator (default 12)")
    parser.add_argument("--store-gbs", type=float, help="GB/s that the object store delivers to the job")
    parser.add_argument("--json", type=Path, help="write the plan as JSON")
    parser.add_argument("--plot", type=Path, help="draw it: .png, .svg or .pdf; needs the extra `plot`")
    return parser
