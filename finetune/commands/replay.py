"""Command line of launch/replay.py."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.commands.exit_codes import run_command
from pretrain.commands.option_types import positive

if TYPE_CHECKING:
    from pretrain.trained.replay_step import MicroBatch, StepPlace

DESCRIPTION = """\
Run one step of a run again, alone and without an update, and name the first module whose weights, output or gradient
is not finite, with the samples that it saw. Pre-training and fine-tuning runs alike.
"""
EPILOG = """\
example:
  python launch/replay.py runs/mine 12345
      steps are counted from 1, as in metrics.jsonl and the names of RUN/incidents/step_00012345.json

The batch is exactly the run's, for all its ranks in turn. The weights are those of the newest checkpoint before the
step; the first line says which.

exit codes: 0 done, 1 failed, 2 wrong usage
"""

#: Modules that are shown around the one that went wrong.
AROUND = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command("replay", make_parser(), argv, _replay)


def _replay(arguments: argparse.Namespace) -> None:
    from finetune.recipe import PROGRAMS
    from pretrain.objectives.base import method_of
    from pretrain.runtime.pictures import save_pictures
    from pretrain.trained.load_run import load_stored_recipe
    from pretrain.trained.replay_step import find_place, most_suspicious, replay, write_report

    place = find_place(arguments.run, arguments.step)
    method = method_of(load_stored_recipe(place.recipe_file, PROGRAMS))
    print("\n".join(_head(place)))
    replayed = []
    for one in replay(place, method, arguments.rank):
        print(_line(one))
        replayed.append(one)
        shown = most_suspicious(replayed)
        if one.finding is not None and not arguments.all:
            break
    print("\n".join(_verdict(place, shown)))
    print("\n".join(_table(shown)))
    report = write_report(place, replayed)
    print(f"written: {report}")
    for name, clips in shown.clips.items():
        # One picture each: clips of different lengths don't fit into one.
        for path in save_pictures({name: clips}, report.with_name(f"{report.stem}_{name}"), arguments.clips):
            print(f"written: {path}")
    if not shown.clips:
        print("no picture: its batch holds no clips")


def _head(place: "StepPlace") -> Iterator[str]:
    behind = place.step - 1 - place.weights_step
    where = str(place.checkpoint) if place.checkpoint else "the recipe's first weights: no checkpoint is from before"
    yield f"step {place.step}, {place.world_size} ranks; weights: {where}"
    if behind:
        yield f"  they are {behind} updates older than the step's own: losses will differ from the run's"
    if place.record:
        yield f"  recorded: {place.record['what']}; {place.record['action']}; update {place.record['update']}"


def _line(one: "MicroBatch") -> str:
    from pretrain.objectives.base import ALL

    recorded = "" if one.recorded is None else f" (recorded: {one.recorded:.9g})"
    found = f"  {one.finding.phase}: {one.finding.text}" if one.finding else ""
    turn = "" if one.turn == ALL else f", turn {one.turn}"
    return f"rank {one.rank}, micro-batch {one.micro}{turn}: loss {one.loss:.9g}{recorded}{found}"


def _verdict(place: "StepPlace", one: "MicroBatch") -> Iterator[str]:
    if one.finding is None:
        yield "everything is finite; the highest loss has"
    else:
        yield f"first non-finite: {one.finding.module} ({one.finding.phase})"
    yield f"  rank {one.rank}, micro-batch {one.micro}, its samples (key at position; * where it shows):"
    marked = set(one.finding.clips) if one.finding else set()
    for number, (key, position) in enumerate(zip(one.keys, one.positions, strict=True)):
        yield f"  {'*' if number in marked else ' '} {key} at {position}"


def _table(one: "MicroBatch") -> Iterator[str]:
    """Tabulate activations of the modules around the finding, in the order in which they finish."""
    names = list(one.activations)
    if not names:
        return
    at = names.index(one.finding.module) if one.finding and one.finding.module in names else len(names) - 1
    shown = names[max(0, at - AROUND) : at + AROUND + 1]
    width = max(map(len, shown))
    yield f"  {'module':{width}}  {'largest':>10}  {'rms':>10}  not finite"
    for name in shown:
        value = one.activations[name]
        yield f"  {name:{width}}  {value.largest:10.4g}  {value.rms:10.4g}  {value.nonfinite}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "replay.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("step", type=int, help="step, counted from 1")
    parser.add_argument("--rank", type=int, help="only this rank's micro-batches (default: all ranks in turn)")
    parser.add_argument("--all", action="store_true", help="go on after the first micro-batch that is not finite")
    parser.add_argument("--clips", type=positive, default=8, help="clips in the picture (default 8)")
    return parser
