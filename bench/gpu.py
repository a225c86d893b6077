"""The first session on a GPU: one command a question, each below ten minutes (hang: eleven), in the order of asking.

    python bench/gpu.py list                     what there is
    python bench/gpu.py all                      one after the other; what fails is told at the end
    python bench/gpu.py step_b                   one of them
    python bench/gpu.py all --cpu                toy sizes: goes through the same code without a GPU, measures nothing

Results are written to bench/results/gpu/NAME.json with device, driver, versions and date (with --cpu to
.cache/bench/gpu), and printed as tables. rates.json is what `launch/plan.py --rates` reads. Measurements on ranks take
all GPUs of this machine. Further words, key=value, change the recipes that are trained.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from bench.gpu_session.session import ROOT, Rows, Session, as_markdown, save

RESULTS, CPU_RESULTS = ROOT / "bench" / "results" / "gpu", ROOT / ".cache" / "bench" / "gpu"


@dataclass(frozen=True)
class Measurement:
    """The function of its name in bench/gpu_session/MODULE.py; `on_ranks`: each of several processes runs it."""

    module: str
    question: str
    on_ranks: bool = False
    limit_s: float = 600.0


MEASUREMENTS = {
    "doctor": Measurement("runs", "is the machine sound, how fast are its links?"),
    "rates": Measurement("rates", "how fast are large products and memory?"),
    "alignment": Measurement("rates", "what does filling 2,234 channels up to 2,240 gain?"),
    "step_b": Measurement("steps", "ViT-B on one GPU: attention, MFU, compiling, recomputing, memory, kernels"),
    "step_g": Measurement("steps", "the same of ViT-g"),
    "deterministic": Measurement("steps", "what does compute.deterministic cost?"),
    "fp8": Measurement("steps", "what does compute.fp8 gain ViT-g?"),
    "stages": Measurement("stages", "three steps of every stage, format, recomputation, init: right gradients?", True),
    "curve": Measurement("stages", "does bf16 here follow float32 on the CPU?"),
    "engine": Measurement(
        "engines", "the run's step in ZeRO 1, 2, 3: time, waits, exposed communication, memory beside the plan", True
    ),
    "copies": Measurement("rates", "pinned and pageable copies to the device, beside work"),
    "workers": Measurement("feeding", "8, 12, 16 data workers"),
    "decoders": Measurement("feeding", "decoding on the GPU"),
    "saving": Measurement("runs", "pauses of saves, time to resume"),
    "kill": Measurement("runs", "kill -9, and the same command again: the same losses?"),
    "hang": Measurement("engines", "does a run outlive a rank that is late by more than NCCL's 600 s?", True, 720),
}


def main() -> None:
    """Run one measurement, or all; the exit code is 1 if one fails."""
    options = parse()
    if options.name == "list":
        print("\n".join(f"{name:<14} {one.question}" for name, one in MEASUREMENTS.items()))
    elif options.name == "all":
        sys.exit(run_all(options))
    elif options.folder:
        rank(options)
    else:
        run_one(options)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("list", "all", *MEASUREMENTS), metavar="list|all|NAME")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--cpu", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--out", type=Path, help=f"folder of the results (default {RESULTS.relative_to(ROOT)})")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # this is one of several ranks
    options = parser.parse_intermixed_args()
    options.out = (options.out or (CPU_RESULTS if options.cpu else RESULTS)).resolve()
    return options


def run_all(options: argparse.Namespace) -> int:
    """Run each in a process of its own, so that none inherits another's memory or failure."""
    failed = []
    for name, one in MEASUREMENTS.items():
        words = [sys.executable, __file__, name, "--out", str(options.out), *options.overrides]
        print(f"\n== {name}: {one.question}", flush=True)
        try:
            code = subprocess.run([*words, *["--cpu"] * options.cpu], timeout=one.limit_s).returncode
            failed += [f"{name} (exit code {code})"] if code else []
        except subprocess.TimeoutExpired:
            failed.append(f"{name} (longer than {one.limit_s:.0f} s)")
    print(f"\n{len(MEASUREMENTS) - len(failed)} done" + (f", failed: {', '.join(failed)}" if failed else ""))
    return bool(failed)


def run_one(options: argparse.Namespace) -> None:
    """Measure, print the tables, write the result."""
    one, started = MEASUREMENTS[options.name], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        session = session_of(options, Path(folder))
        if one.on_ranks:
            words = [__file__, options.name, "--folder", folder, *["--cpu"] * options.cpu, *options.overrides]
            session.run(words, session.ranks)
            tables: dict[str, Rows] = json.loads((session.folder / "found.json").read_text(encoding="utf-8"))
        else:
            tables = function_of(options.name)(session)
    for title, rows in tables.items():
        print(as_markdown(title, rows), flush=True)
    path = options.out / f"{options.name}.json"
    save(path, session, tables, time.monotonic() - started)
    print(f"\n{path}")


def session_of(options: argparse.Namespace, folder: Path) -> Session:
    """Choose the device; end where the GPU that is asked for can't be seen."""
    # Before torch counts its threads and DeepSpeed looks for accelerators.
    if options.cpu:
        os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
    import torch

    if not options.cpu and not torch.cuda.is_available():
        sys.exit("gpu.py: found no GPU that torch can see; --cpu goes through the same code without one")
    return Session(torch.device("cpu" if options.cpu else "cuda"), folder, tuple(options.overrides))


def function_of(name: str) -> Callable[..., dict[str, Rows]]:
    """Load a measurement's function; each module only when it is asked for."""
    module = import_module(f"bench.gpu_session.{MEASUREMENTS[name].module}")
    found: Callable[..., dict[str, Rows]] = getattr(module, name)
    return found


def rank(options: argparse.Namespace) -> None:
    """Take part in a measurement as one of several ranks; the first writes what was found."""
    session = session_of(options, options.folder)
    from pretrain.runtime.process_group import join, leave

    ranks = join()
    tables = function_of(options.name)(session, ranks)
    if ranks.first:
        (session.folder / "found.json").write_text(json.dumps(tables), encoding="utf-8")
    leave(ranks)


if __name__ == "__main__":
    main()
