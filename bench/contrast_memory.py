"""Memory and time of InfoNCE with all logits at once and in pieces, at SNCLR's published size (CPU, float32).

    python bench/contrast_memory.py [--anchors 4096] [--candidates 127000] [--chunks 1024 256 64] [--out FILE]

Each row is a process of its own: forward and backward, with 30 soft positives an anchor. Peak: growth of its resident
memory above what stands before, code and embeddings. Times are processor times. The last column: how far loss and
norms of gradients are from the plain ones.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

SOFT = 30


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (most since the last reset) of this process, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(anchors: int, candidates: int, dims: int, chunk: int | None) -> None:
    """One row: a forward and a backward pass on made-up embeddings."""
    import torch

    from pretrain.objectives.contrast import info_nce, normalized

    generator = torch.Generator().manual_seed(0)
    sides = [normalized(torch.randn(rows, dims, generator=generator)) for rows in (anchors, candidates)]
    first, second = leaves = [side.requires_grad_() for side in sides]
    columns = torch.randint(candidates, (anchors, 1 + SOFT), generator=generator)
    weights = torch.rand(anchors, SOFT, generator=generator).requires_grad_()
    # Once small: code and threads are loaded.
    info_nce(first[:2], second[:64], columns[:2, 0] % 64, 0.2, chunk=1).sum().backward()
    for leaf in leaves:
        leaf.grad = None
    before, begun = resident("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")
    loss = info_nce(first, second, columns[:, 0], 0.2, soft=columns[:, 1:], weights=weights, chunk=chunk).mean()
    forward, between = resident("VmHWM") - before, time.process_time()
    loss.backward()
    ended = time.process_time()
    norms = [float(leaf.grad.norm()) for leaf in (*leaves, weights) if leaf.grad is not None]
    result = {
        "chunk": chunk, "forward_bytes": forward, "bytes": resident("VmHWM") - before,
        "forward_s": between - begun, "backward_s": ended - between, "loss": loss.item(), "norms": norms,
    }  # fmt: skip
    print("RESULT " + json.dumps(result), flush=True)


def run(options: argparse.Namespace, chunk: int | None) -> dict:
    """Start the process of a row and read its numbers."""
    words = ["--anchors", options.anchors, "--candidates", options.candidates, "--dims", options.dims]
    command = [sys.executable, str(Path(__file__)), *map(str, words), "--one", str(chunk or 0)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith("RESULT "))[7:])


def table(rows: list[dict], options: argparse.Namespace) -> str:
    """Write the results as Markdown."""
    plain = rows[0]
    logits = options.anchors * options.candidates * 4
    lines = [
        f"# Contrast in pieces, {time.strftime('%Y-%m-%d')}",
        "",
        f"{options.anchors} anchors x {options.candidates} candidates, {options.dims} channels, {SOFT} soft positives "
        f"an anchor, float32 on the CPU, {os.environ.get('OMP_NUM_THREADS', os.cpu_count())} thread(s), load average "
        f"{os.getloadavg()[0]:.0f};",
        f"all logits are {logits / 1e9:.2f} GB.",
        "Peak: growth of the process's resident memory, by the end of the forward pass and of both passes. Times are "
        "processor times.",
        "",
        "| rows at once | peak, forward | peak | x plain | forward | backward | x plain | loss, gradients |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = row["forward_s"] + row["backward_s"]
        pairs = zip([row["loss"], *row["norms"]], [plain["loss"], *plain["norms"]], strict=True)
        off = max(abs(one / other - 1) for one, other in pairs)
        lines.append(
            f"| {row['chunk'] or 'all (plain)'} | {row['forward_bytes'] / 1e9:.2f} GB | {row['bytes'] / 1e9:.2f} GB | "
            f"{row['bytes'] / plain['bytes']:.3f} | {row['forward_s']:.1f} s | {row['backward_s']:.1f} s | "
            f"{seconds / (plain['forward_s'] + plain['backward_s']):.2f} | within {off:.0e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure plain and every chunk, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchors", type=int, default=4096)
    parser.add_argument("--candidates", type=int, default=127_000)
    parser.add_argument("--dims", type=int, default=256)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 256, 64])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="file to write the table to")
    options = parser.parse_args()
    if options.one is not None:
        measure(options.anchors, options.candidates, options.dims, options.one or None)
        return
    text = table([run(options, chunk) for chunk in (None, *options.chunks)], options)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
