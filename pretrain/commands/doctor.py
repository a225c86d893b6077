"""The command line of launch/doctor.py."""

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from pretrain.errors import RecipeError, TubeletError
from pretrain.recipe.schema import PRETRAINING, Recipe
from pretrain.runtime.findings import Line
from pretrain.runtime.orphans import die_with_launcher

DESCRIPTION = """\
Examine the hosts of a run before it is started, or after it has failed: versions, recipe, clocks, limits, disk,
storage, decoder, arithmetic, memory, network. What is wrong is told with the host and what to do.
Start it as the run is started.
"""
EPILOG = """\
examples:
  python launch/doctor.py --recipe vit_b_dual
      this machine
  deepspeed --hostfile hosts launch/doctor.py --recipe vit_b_dual data.root=s3://bucket/video
      all hosts of the file
  srun python launch/doctor.py --recipe vit_b_dual --json
      all hosts of a Slurm job, as JSON

exit codes: 0 all well or warnings only, 1 something failed, 2 wrong recipe or usage
"""


def main(argv: Sequence[str] | None = None, kinds: Mapping[str, type[Recipe]] = PRETRAINING) -> int:
    """Run the command; returns the exit code."""
    # First of all: once the launcher is gone, it can hardly be told from init.
    die_with_launcher()
    arguments = make_parser(list(kinds)).parse_intermixed_args(argv)
    # Before the ranks have met, only their launcher's variables tell which one fails.
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    try:
        return _examine(arguments, kinds[arguments.kind])
    except RecipeError as error:
        print(f"rank {rank}: recipe: {error}", file=sys.stderr)
        return 2
    except TubeletError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        return 1


def _examine(arguments: argparse.Namespace, kind: type[Recipe]) -> int:
    from pretrain.recipe.load import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides, kind)

    # Only now: a wrong recipe is told without the seconds that torch takes.
    from pretrain.doctor.examine import examine
    from pretrain.doctor.network import listen
    from pretrain.objectives.base import method_of
    from pretrain.runtime.cores import bind_to_device
    from pretrain.runtime.process_group import join, leave

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # DeepSpeed tells its start at INFO, on every rank, in between the findings.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    nccl = listen(os.environ)
    ranks = join(timeout_s=recipe.watchdog.join_s)
    try:
        bind_to_device(ranks, recipe.data.affinity)
        lines = examine(method_of(recipe), ranks, nccl)
        if ranks.first:
            print(as_json(lines) if arguments.json else as_table(lines, ranks.world_size))
        return 1 if any(line.status == "fail" for line in lines) else 0
    finally:
        leave(ranks)
        if nccl is not None:
            shutil.rmtree(nccl.parent, ignore_errors=True)


def as_json(lines: list[Line]) -> str:
    """Return one JSON object: the worst status, and all lines."""
    order = ("ok", "warn", "fail")
    worst = max((line.status for line in lines), key=order.index, default="ok")
    return json.dumps({"status": worst, "checks": [asdict(line) for line in lines]}, indent=1)


def as_table(lines: list[Line], world_size: int) -> str:
    """Return one row a check; what to do stands below what is not well."""
    rows = [f"{world_size} ranks examined"]
    for line in lines:
        where = f"{line.where}: " if line.where else ""
        rows.append(f"  {line.status:<5} {line.check:<22} {where}{line.value}")
        if line.status != "ok" and line.advice:
            rows.append(f"  {'':<5} {'':<22} -> {line.advice}")
    count = sum(line.status == "fail" for line in lines)
    rows.append(f"{count} failed" if count else "nothing failed")
    return "\n".join(rows)


def make_parser(kinds: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "doctor.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", required=True, metavar="NAME|PATH", help="the run's recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="the run's changes of it")
    parser.add_argument("--kind", choices=kinds, default=kinds[0], help="whose recipe it is")
    parser.add_argument("--json", action="store_true", help="write the findings as JSON")
    # The deepspeed launcher puts it first; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser
