"""docs/reliability.md from results: no row without a run.

    python tests/faults/report.py FOLDER docs/reliability.md

FOLDER holds matrix*.json, soak*.json and slurm*.xml, as `make faults` and `make soak` leave them.
"""

import json
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEAD = """\
# Reliability

What happened when things were broken on purpose. Every row is a run of real processes, and was written by
`tests/faults/report.py` from what was seen; what is promised in general is in [operations.md](operations.md).

`make faults` runs all of it, `make soak` the soak; CI runs a part (tests/faults/test_matrix.py).

## How

A tiny VideoMAE (126,592 parameters, float32, ZeRO 2) is trained for 15 steps, three epochs of five, with a checkpoint
after 4, 8, 12 and 15. It is held in a phase (tests/faults/rank.py), the fault is injected from outside, it is let go,
and the same command is started again until it is done. **Kept** means all of this:

- exit codes and messages of the first start are those that are promised;
- no process of it is left, data workers included, and every published checkpoint verifies;
- each further start ends with 0 or 75, the last one with 0;
- metrics.jsonl holds each step once, and loss, gradient norm and learning rate of every step are equal to those of an
  undisturbed run, bit for bit (within 1e-5 where the layout changes; where a step is left out, the curve is another).

Recovery is the time from the fault to the first step after it, of the next start where there is one. The machine did
other work meanwhile, so the times are upper bounds. Ranks are forked from a process that has loaded the libraries
already, as tasks without a launcher; loading them takes a few seconds more. Rows with the `deepspeed` command start
through it. The S3 server is rclone's, behind a proxy that injects the faults; disks that fill up and read-only ones are
mounts of their own.

Phases: **pack** (before training, which reads what is packed then), **start** (ranks have met, nothing is built),
**first step**, **mid-epoch** (step 8), **epoch border** (between steps 5 and 6), **save** (files of step 8 are written,
not yet hashed or published), **publish** (its manifest is written, it is not renamed yet), **upload** (a checkpoint is
being sent to the store), **resume** (a run that was killed after 10 steps is started; held before its states are
loaded), **download** (a checkpoint comes back from the store).

**Not exercised**, for want of the means: accelerators and their collectives (NCCL); hosts that differ in hardware, and
more than two; a parallel file system (a lock that does not work is imitated by what the call answers); loss of power
(what it leaves in files is imitated: zeros, cut lines, half-published folders); memory that flips bits; the stores of
large vendors, their limits and their clocks (the servers are rclone's and SeaweedFS's); wandb's own server.
"""


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows, faults of one kind together."""
    lines = ["| fault | where | ranks | promised | seen | kept | recovery |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        recovery = "–" if row["recovery_s"] is None else f"{row['recovery_s']:.1f} s"
        seen = row["seen"] if row["kept"] else row["seen"].split("\n")[0][:200].replace("|", "/")
        cells = [
            row["fault"],
            row["phase"],
            str(row["ranks"]),
            row["promise"],
            seen,
            "yes" if row["kept"] else "**no**",
        ]
        lines.append("| " + " | ".join([*cells, recovery]) + " |")
    return "\n".join(lines)


def soak_text(soak: dict[str, Any]) -> str:
    """The soak's paragraph."""
    counts: dict[str, int] = {}
    for event in soak["events"]:
        counts[event["fault"]] = counts.get(event["fault"], 0) + 1
    drawn = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
    same = (
        "equal to the undisturbed run's, bit for bit" if soak["same_losses"] else "**not** those of the undisturbed run"
    )
    return f"""\
## Soak

{soak["date"]}, {soak["machine"]}: {soak["minutes"]:.0f} minutes, {soak["steps"]} steps on two ranks with ZeRO 2, data
from the S3 server and checkpoints to it, {soak["faults"]} faults (seed {soak["seed"]}), {soak["starts"]} starts. Loss,
gradient norm and learning rate of all steps are {same}. At the end the store held
{", ".join(soak["uploaded"])}.

{memory_text(soak["memory"])}

Faults: {drawn}.
"""


def memory_text(memory: dict[str, Any]) -> str:
    """What the samples of memory say. The first soak had no undisturbed run beside it, and counted starts as growth."""
    alone = memory.get("slope_mb_per_min_undisturbed")
    since = "From 20 s after its first step on" if alone else "From the age of 30 s on, the rest of the start included,"
    text = f"""\
Memory, sampled every second: of {memory["processes"]} rank processes {memory["watched"]} lived long enough.
{since} their resident memory changed by {memory["slope_mb_per_min_median"]} MB a minute in the median,
{memory["slope_mb_per_min_largest"]} at most; it was {memory["first_start_mb"]} MB in the first start and
{memory["last_start_mb"]} MB in the last, and never above {memory["most_mb"]} MB."""
    if alone:
        text += f" The ranks of the undisturbed run changed by {' and '.join(map(str, alone))} MB a minute."
    return text


def slurm_text(paths: Sequence[Path]) -> str:
    """Tests on the real Slurm cluster, from pytest's reports; of one that was run again, the last run counts."""
    rows: dict[str, str] = {}
    for case in (case for path in paths for case in ElementTree.parse(path).iter("testcase") if case.get("name")):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        name = case.get("name", "").replace("_", " ")
        rows[name] = f"| {name} | {outcome} | {float(case.get('time', 0)):.0f} s |"
    lines = ["## Slurm", "", "Real slurmctld and slurmds with two nodes on one machine (tests/slurm).", ""]
    return "\n".join([*lines, "| test | outcome | took |", "|---|---|---|", *rows.values()]) + "\n"


def page(folder: Path) -> str:
    """The page from a folder of results: matrix*.json, soak*.json, slurm*.xml, as far as they are there."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("matrix*.json"))]
    # Of a case that was run again after a correction, the last run counts.
    rows = {(row["fault"], row["phase"], row["ranks"]): row for report in reports for row in report["rows"]}
    kept = sum(row["kept"] for row in rows.values())
    parts = [HEAD]
    if reports:
        title = f"## Matrix\n\n{reports[-1]['date']}, {reports[-1]['machine']}: {kept} of {len(rows)} kept.\n\n"
        times = [row["recovery_s"] for row in rows.values() if row["recovery_s"] is not None]
        title += f"Recovery: {statistics.median(times):.1f} s in the median, {max(times):.1f} s at most.\n\n"
        parts.append(title + table(sorted(rows.values(), key=lambda row: (row["fault"], row["phase"]))) + "\n")
    parts += [soak_text(json.loads(path.read_text())) for path in sorted(folder.glob("soak*.json"))]
    if slurm := sorted(folder.glob("slurm*.xml")):
        parts.append(slurm_text(slurm))
    return "\n".join(parts)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    Path(sys.argv[2]).write_text(page(Path(sys.argv[1])))
