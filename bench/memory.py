"""What the plan says of a rank's memory, beside what DeepSpeed's processes really take (CPU, gloo).

    python bench/memory.py                  stages 0-3 in float32 and bf16, two processes
    python bench/memory.py --stage 2 --dtype bf16

Numbers are bytes a parameter. Real: growth of the process's resident memory, most at one time, over two steps, from
before the engine is built. Code is loaded before: DeepSpeed and torch's compiler, which it imports for one of its
optimisers, are 140 MB, which no number of parameters changes and a large model would not show.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

#: A model of 63 M parameters, whose states outweigh what Python and torch allocate beside them.
OVERRIDES = [
    "model.dim=768", "model.depth=8", "model.heads=8", "model.decoder_dim=384", "model.decoder_depth=2",
    "model.decoder_heads=4", "batch.samples=8", "input.views=2",
]  # fmt: skip


PARTS = ("weights", "gradients", "optimiser", "buffers", "activations")


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (most since the last reset) of this process, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(overrides: list[str]) -> None:
    """One rank: build the engine, take two steps on made-up pixels, print growth and plan."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (DeepSpeed imports it while it builds an engine)
    import torch

    from pretrain.engine.build import build_engine, count_model
    from pretrain.objectives.base import method_of
    from pretrain.plan.peak_memory import memory_of
    from pretrain.plan.trace import trace_step
    from pretrain.recipe.load import load_recipe
    from pretrain.runtime.process_group import join, leave

    method = method_of(load_recipe("demo", overrides))
    recipe = method.recipe
    ranks = join()
    trace = trace_step(method, recipe.batch.micro, on_cpu=True)
    batch = method.example(recipe.batch.micro)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    built = build_engine(method, ranks, recipe.batch.samples // recipe.batch.micro // ranks.world_size)
    built_by = resident("VmHWM") - before
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        loss = built.engine(batch).loss
        built.engine.backward(loss)
        built.engine.step()
    gc.collect()
    planned = memory_of(recipe, count_model(method), ranks.world_size, trace.peak_bytes, on_cpu=True)
    result = {
        "stage": recipe.zero.stage, "dtype": recipe.compute.dtype, "parameters": built.parameters,
        "held": resident("VmRSS") - before, "peak": resident("VmHWM") - before, "building": built_by,
        "planned": vars(planned) | {"total": planned.total},
    }  # fmt: skip
    torch.distributed.barrier()
    if ranks.first:
        print("RESULT " + json.dumps(result), flush=True)
    leave(ranks)


def run(stage: int, dtype: str, processes: int) -> dict:
    """Start the processes and read rank 0's numbers."""
    words = [*OVERRIDES, f"zero.stage={stage}", f"compute.dtype={dtype}"]
    # What is freed goes back to the system at once, or resident memory would not show it.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", __file__, "--rank", *words]
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(done.stdout[-3000:] + done.stderr[-9000:-1500])
    return json.loads(lines[0].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, action="append", choices=range(4))
    parser.add_argument("--dtype", action="append", choices=("fp32", "bf16"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rank", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        return measure(arguments.rank)
    print("bytes a parameter, most at one time; rank 0 of", arguments.processes)
    for dtype in arguments.dtype or ("fp32", "bf16"):
        for stage in arguments.stage or range(4):
            result = run(stage, dtype, arguments.processes)
            planned, parameters = result["planned"], result["parameters"]
            parts = ", ".join(f"{part} {planned[part] / parameters:.2f}" for part in PARTS if planned[part])
            share, peak = planned["total"] / result["peak"], result["peak"] / parameters
            print(f"{dtype} stage {stage}: real {peak:.2f}, plan / real {share:.2f} ({parts})", flush=True)
    return None


if __name__ == "__main__":
    main()
