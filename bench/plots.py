"""Draws bench/results as docs/performance.md shows them.

python bench/plots.py [--out docs/images/performance.png]
Left: the step's speed relative to the official one, for each size. Right: clips a second and core of the loader. Takes
the newest results of bench/step.py and bench/loader.py.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib.figure import Figure  # noqa: E402

ROOT = Path(__file__).parents[1]
#: Rows of the step's tables that are drawn, by name.
STEPS = ("official, dual masking", "ours, dual masking", "ours, dual masking, bf16")
#: Ways of the loader that are drawn, from the slowest on.
LOADERS = ("official, GOP 250", "ours, GOP 250", "official, packed", "ours, packed")
COLORS = ("#9aa5b1", "#3b82c4", "#1d4e89")


def main() -> None:
    """Read, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "performance.png")
    options = parser.parse_args()
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_steps(left, step_seconds(newest("step")))
    draw_loader(right, loader_rates(newest("loader")))
    figure.savefig(options.out, dpi=110)
    print(options.out)


def newest(benchmark: str) -> str:
    """Text of the newest results of a benchmark."""
    return max((ROOT / "bench" / "results").glob(f"{benchmark}_2*.md")).read_text(encoding="utf-8")


def step_seconds(text: str) -> dict[str, dict[str, float]]:
    """Seconds of a step by size and row."""
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        if title := re.match(r"ViT-(\w+): seconds", line):
            rows = found[title[1]] = {}
        elif row := re.match(r"  (\S.*?)\s+([\d.]+)\s+[\d.]+\s+[\d.]+\s+\d+%", line):
            rows[row[1]] = float(row[2])
    return found


def loader_rates(text: str) -> dict[str, float]:
    """Clips a second and core by way."""
    return {name: float(rate) for name, rate in re.findall(r"^\| (.*?) \| ([\d.]+) \| \d+ \|$", text, flags=re.M)}


def draw_steps(axes: Any, seconds: dict[str, dict[str, float]]) -> None:
    """Speed relative to the official step, a group of bars for each size."""
    for number, row in enumerate(STEPS):
        speeds = [rows[STEPS[0]] / rows[row] for rows in seconds.values()]
        places = [place + (number - 1) * 0.27 for place in range(len(seconds))]
        axes.bar_label(axes.bar(places, speeds, 0.25, color=COLORS[number], label=row), fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(seconds)), [f"ViT-{size[0].upper()}" for size in seconds])
    axes.set_title("training step, one core: times the official speed", fontsize=10)
    legend_below(axes)
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def draw_loader(axes: Any, rates: dict[str, float]) -> None:
    """Clips a second with one and four views of each, and the bare decoder as the limit."""
    for number, views in enumerate((1, 4)):
        made = [rates[f"{way}, {views}"] for way in LOADERS]
        places = [place + (number - 0.5) * 0.4 for place in range(len(LOADERS))]
        bars = axes.barh(places, made, 0.38, color=COLORS[1 + number], label=f"{views} view{'s'[: views - 1]} a clip")
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    limit = rates["bare pyav, packed"]
    axes.axvline(limit, color=COLORS[0], linestyle="--", label=f"bare decoder, packed, no views made: {limit:.0f}")
    axes.set_yticks(range(len(LOADERS)), LOADERS)
    axes.set_title("loader: clips a second and core", fontsize=10)
    legend_below(axes)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(axes: Any) -> None:
    """A row under the axis."""
    axes.legend(
        fontsize=7,
        loc="upper center",
        bbox_to_anchor=(0.45, -0.08),
        ncols=3,
        frameon=False,
        handlelength=1.2,
        columnspacing=1.0,
    )


if __name__ == "__main__":
    main()
