"""Command line of launch/slurm/submit.py: options of a cluster and a run -> one sbatch command, printed or run."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.runtime.terminal import take_any_name

EXAMPLES = """\
examples:
  python launch/slurm/submit.py pretrain --nodes 4 --recipe vit_b_dual run.dir=/shared/runs/vit_b --print
      the sbatch command, nothing is submitted
  python launch/slurm/submit.py pretrain --nodes 4 --launcher torchrun --recipe vit_b_dual run.dir=/shared/runs/vit_b
      one torchrun on each node instead of one srun task for each GPU
  python launch/slurm/submit.py finetune --recipe vit_b_k400 run.dir=/shared/k400 run.init_weights=/shared/runs/vit_b
      one node of 8 GPUs
  python launch/slurm/submit.py pretrain --chain 5 --time 12:00:00 --recipe vit_l_dual run.dir=/shared/runs/vit_l
      five jobs, one after the other, where a cluster forbids that jobs return to the queue
  python launch/slurm/submit.py pack --parts 16 train.csv s3://bucket/k400 --data-root /data/k400
      a job array of sixteen packers

Prints the number of each job. Jobs start in the present folder: relative paths count from there, and what a job says
goes there, to <program>-<number>.out. An installed package must lie where all nodes see it.
exit codes: 0 submitted or printed, 1 sbatch failed, 2 wrong usage
"""

#: Where launch/ lies. A batch script is copied before it runs, so it can't find this by itself.
ROOT = Path(__file__).resolve().parents[2]

#: Containers: what goes before python (apptainer), or into srun's options (pyxis).
CONTAINERS = ("pyxis", "apptainer")


def make_parser() -> argparse.ArgumentParser:
    """Build the options of submit.py; what it does not know belongs to the program that the job runs."""
    parser = argparse.ArgumentParser(
        prog="submit.py",
        description="Submit pre-training, fine-tuning or packing to Slurm. Other arguments go to the program.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Else pack.py's --part would be refused here, as short for either --parts or --partition.
        allow_abbrev=False,
    )
    parser.add_argument("program", choices=("pretrain", "finetune", "pack"), help="launch/slurm/<program>.sbatch")
    parser.add_argument("--print", action="store_true", help="print the sbatch commands instead of running them")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default 1)")
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="GPUs, and ranks, of a node (default 8)"
    )
    parser.add_argument(
        "--cpus-per-task", type=int, default=12, metavar="N", help="cores of a rank or packer (default 12)"
    )
    parser.add_argument("--no-gpus", action="store_true", help="as many ranks, but ask for no GPU (test on processors)")
    parser.add_argument(
        "--time", default="24:00:00", metavar="D-HH:MM:SS", help="time limit of a job (default 24:00:00)"
    )
    for name in ("partition", "account", "qos"):
        parser.add_argument(f"--{name}", metavar="NAME", help=f"Slurm's {name}")
    parser.add_argument("--launcher", choices=("srun", "deepspeed", "torchrun"), default="srun", help=_LAUNCHER)
    parser.add_argument("--stop-lead", type=int, default=300, metavar="SECONDS", help=_LEAD)
    parser.add_argument("--max-failures", type=int, default=3, metavar="N", help=_FAILURES)
    parser.add_argument("--chain", type=int, default=0, metavar="N", help=_CHAIN)
    parser.add_argument("--parts", type=int, default=16, metavar="N", help="pack: tasks of the job array (default 16)")
    parser.add_argument("--container", metavar="IMAGE", help="image in which the ranks run")
    parser.add_argument("--container-with", choices=CONTAINERS, default="pyxis", help="what runs it (default pyxis)")
    parser.add_argument("--mount", action="append", default=[], metavar="PATH", help="folder that the container sees")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help=_SBATCH)
    return parser


_LAUNCHER = "srun: one task for each GPU; deepspeed, torchrun: one launcher on each node (default srun)"
_LEAD = "seconds before the time limit at which the run is asked to save and stop (default 300)"
_FAILURES = "failures in a row without a further step after which the job ends (default 3)"
_CHAIN = "submit N jobs, each starting when the one before ends, that never return to the queue themselves"
_SBATCH = "further option of sbatch, repeatable: --sbatch=--exclude=node7"


def main(argv: Sequence[str] | None = None) -> int:
    """Submit or print; returns the exit code."""
    take_any_name()
    parser = make_parser()
    arguments, words = parser.parse_known_args(argv)
    problem = _problem(arguments, words)
    if problem:
        parser.error(problem)
    if arguments.print:
        for number in range(max(1, arguments.chain)):
            before = "JOB_BEFORE" if number else ""
            environ, command = sbatch_command(arguments, words, before)
            print(shlex.join([*(f"{key}={value}" for key, value in environ.items()), *command]))
        return 0
    return _submit(arguments, words)


def _problem(arguments: argparse.Namespace, words: list[str]) -> str:
    if arguments.program == "pack":
        return "" if words else "pack needs SOURCE and DEST, as launch/pack.py does"
    if not any(word.startswith("run.dir=") for word in words):
        return "run.dir=FOLDER is missing: a folder that all nodes see; the job is stopped and judged through its files"
    if "--recipe" not in words and not any(word.startswith("--recipe=") for word in words):
        return "--recipe NAME is missing"
    seconds = limit_seconds(arguments.time)
    if seconds is not None and seconds < 2 * arguments.stop_lead:
        return (
            f"--time {arguments.time} is {seconds} s, and --stop-lead takes the last {arguments.stop_lead} s of it: "
            "the job would do little but start and stop; allowed: at least twice the lead"
        )
    return ""


def limit_seconds(text: str) -> int | None:
    """Read Slurm's `M`, `M:S`, `H:M:S`, `D-H`, `D-H:M`, `D-H:M:S`, seconds; None for anything else: Slurm judges it."""
    days, dash, clock = text.rpartition("-")
    numbers = clock.split(":")
    if not all(number.isdecimal() for number in [*numbers, *([days] if dash else [])]) or len(numbers) > 3:
        return None
    # Slurm's rule: two numbers are minutes and seconds, but behind days they are hours and minutes.
    units = [3600, 60, 1] if dash or len(numbers) == 3 else [60, 1]
    clock_s = sum(int(number) * unit for number, unit in zip(numbers, units, strict=False))
    return 86400 * int(days or 0) + clock_s


def sbatch_command(
    arguments: argparse.Namespace, words: Sequence[str], before: str
) -> tuple[dict[str, str], list[str]]:
    """Build what to add to the environment, and the command; `before`: job that has to end first, empty for none."""
    # --parsable: the job's number alone, on which the next of a chain depends.
    # --export: where SBATCH_EXPORT says otherwise, neither what is added here nor the shell's NCCL_* would arrive.
    options = ["sbatch", "--parsable", "--export=ALL", f"--time={arguments.time}"]
    for name in ("partition", "account", "qos"):
        if value := getattr(arguments, name):
            options.append(f"--{name}={value}")
    # By the environment: templates are scripts of the repository and not filled in, so what ran can be read and typed.
    environ = {"TUBELET_" + key: value for key, value in _container(arguments).items()}
    folder = "launch/slurm"
    if Path.cwd().resolve() != ROOT:
        environ["TUBELET_HOME"] = str(ROOT)
        folder = str(ROOT / folder)
    if arguments.program == "pack":
        options += [f"--array=0-{arguments.parts - 1}", f"--cpus-per-task={arguments.cpus_per_task}"]
    else:
        options += _sizes(arguments)
        environ |= _settings(arguments)
    if arguments.chain:
        # afterany, not afterok: a job that was stopped ends with 75, and is just what the next one goes on from.
        options += ["--no-requeue"] + ([f"--dependency=afterany:{before}"] if before else [])
    return environ, [*options, *arguments.sbatch, f"{folder}/{arguments.program}.sbatch", *words]


def _sizes(arguments: argparse.Namespace) -> list[str]:
    # 0 is said too: what is left out stays as the template has it, 8.
    gpus = 0 if arguments.no_gpus else arguments.gpus_per_node
    return [
        f"--nodes={arguments.nodes}",
        f"--ntasks-per-node={arguments.gpus_per_node}",
        f"--gpus-per-node={gpus}",
        f"--cpus-per-task={arguments.cpus_per_task}",
        # B: only to the batch shell, which passes it on. Slurm sends it up to 60 s early.
        f"--signal=B:USR1@{arguments.stop_lead}",
    ]


def _settings(arguments: argparse.Namespace) -> dict[str, str]:
    settings = {
        "TUBELET_LAUNCHER": arguments.launcher,
        "TUBELET_STOP_LEAD_S": str(arguments.stop_lead),
        "TUBELET_MAX_FAILURES": str(arguments.max_failures),
    }
    return settings | ({"TUBELET_REQUEUE": "0"} if arguments.chain else {})


def _container(arguments: argparse.Namespace) -> dict[str, str]:
    """Mount code and present folder in the container where they are outside, so that paths are the same inside."""
    if not arguments.container:
        return {}
    here = Path.cwd().resolve()
    mounts = [str(ROOT), *([] if here == ROOT else [str(here)]), *arguments.mount]
    if arguments.container_with == "apptainer":
        binds = " ".join(f"--bind {path}" for path in mounts)
        return {"CONTAINER_RUN": f"apptainer exec --nv {binds} --pwd {here} {arguments.container}"}
    pairs = ",".join(f"{path}:{path}" for path in mounts)
    options = f"--container-image={arguments.container} --container-mounts={pairs} --container-workdir={here}"
    return {"SRUN_OPTIONS": options}


def _submit(arguments: argparse.Namespace, words: list[str]) -> int:
    if shutil.which("sbatch") is None:
        print("sbatch is not on PATH: run this on a login node of a Slurm cluster, or add --print", file=sys.stderr)
        return 1
    before = ""
    for _ in range(max(1, arguments.chain)):
        environ, command = sbatch_command(arguments, words, before)
        done = subprocess.run(command, env=os.environ | environ, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return 1
        # Where there are several clusters the number is followed by ;CLUSTER.
        before = done.stdout.strip().partition(";")[0]
        print(before)
    return 0
