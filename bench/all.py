"""The benchmarks that need no GPU, short, and one table of their ratios: make bench (below 15 minutes on two cores).

python bench/all.py [--official PATH] [--out FILE]
Each benchmark is a process of its own, one after the other; its own file says what it measures and how to run it at
length. Results of an idle machine only mean anything.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
CAMERA = ROOT / ".cache" / "bench" / "camera"
VIDEOS = [str(CAMERA / "bikes.mp4"), str(CAMERA / "bigbuckbunny.mp4")]


@dataclass(frozen=True)
class Benchmark:
    """A script of this folder, its short arguments, and the lines of its output that are ratios."""

    name: str
    arguments: tuple[str, ...]
    ratios: str
    official: bool = False


BENCHMARKS = (
    Benchmark("step.py", ("--size", "small", "--rounds", "3"), r"^(ViT-|  \S.*%)", official=True),
    Benchmark("loader.py", (*VIDEOS, "--clips", "8", "--rounds", "3"), r"^\| .*/ .*\| *[\d.]+ \||^By the clock", True),
    Benchmark("loader_scale.py", ("--samples", "200"), r"^\| (first|index|memory)"),
    Benchmark("checkpoint.py", ("--layers", "6", "--rounds", "2"), r"^\| (sync|async) "),
    Benchmark("memory.py", ("--stage", "2", "--dtype", "bf16"), r"plan / real"),
)


def main() -> None:
    """Run them all; the exit code is 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="your checkout of OpenGVLab/VideoMAEv2, to compare with")
    parser.add_argument("--out", type=Path, help="file to write the summary to")
    options = parser.parse_args()
    subprocess.run([sys.executable, "-m", "pretrain.commands.camera_clips", str(CAMERA)], cwd=ROOT, check=True)
    begun = time.monotonic()
    rows, failed = [], False
    for benchmark in BENCHMARKS:
        code, output = run(benchmark, options.official)
        failed |= bool(code)
        found = list(picked(benchmark, output)) if not code else [f"failed with exit code {code}"]
        rows += [f"{benchmark.name:<16} {line}" for line in found]
    text = "\n".join([f"== ratios, after {(time.monotonic() - begun) / 60:.1f} minutes", *rows])
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(failed)


def run(benchmark: Benchmark, official: Path | None) -> tuple[int, str]:
    """Exit code and output, which is shown as it comes."""
    words = [sys.executable, str(HERE / benchmark.name), *benchmark.arguments]
    words += ["--official", str(official)] if official and benchmark.official else []
    print(f"== {benchmark.name} {' '.join(words[2:])}", flush=True)
    environ = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(words, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        print(line, end="", flush=True)
    return process.wait(), "".join(lines)


def picked(benchmark: Benchmark, output: str) -> Iterator[str]:
    """The lines that belong into the summary."""
    for line in output.splitlines():
        if re.search(benchmark.ratios, line):
            yield line


if __name__ == "__main__":
    main()
