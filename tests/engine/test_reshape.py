"""Continuing on other numbers of ranks and ZeRO stages, with real processes."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STEPS = 10
#: Steps of the run that is continued elsewhere: inside the first epoch, so that the rest crosses its border.
DONE = 3
STAGES = (0, 1, 2, 3)
FORMATS = ("fp32", "bf16")


def plain(*overrides: str) -> dict[str, Any]:
    return {"overrides": ["batch.micro=2", *overrides]}


def spread(dtype: str, stage: int) -> list[str]:
    return [f"compute.dtype={dtype}", f"zero.stage={stage}"]


def begin(prefix: str, stages: tuple[int, ...] = STAGES) -> dict[str, dict[str, Any]]:
    """Runs that end early, one for each number format and stage. Stage 3 last, see test_ranks.py."""
    return {
        f"{prefix} {dtype} {stage}": plain(*spread(dtype, stage), f"schedule.max_steps={DONE}")
        for stage, dtype in itertools.product(stages, FORMATS)
    }


@pytest.fixture(scope="module")
def written_by_two(toy: Any) -> dict[str, Any]:
    runs = {f"undisturbed {dtype}": plain(*spread(dtype, 0)) for dtype in FORMATS} | begin("two")
    return toy.drive(runs, ranks=2)


def go_on(toy: Any, name: str, source: str, *overrides: str) -> dict[str, dict[str, Any]]:
    shutil.copytree(toy.folder / source, toy.folder / name)
    return {name: plain(*overrides)}


def test_two_to_one(toy: Any, written_by_two: dict[str, Any]) -> None:
    runs: dict[str, Any] = {}
    for new, dtype, old in itertools.product(STAGES, FORMATS, STAGES):
        name = f"one {dtype} {old}-{new}"
        runs |= go_on(toy, name, f"two {dtype} {old}", *spread(dtype, new))
    results = toy.drive(runs, ranks=1)
    print(results)
    for name in runs:
        dtype = name.split()[1]
        a, b = np.array(toy.losses(name)), np.array(toy.losses(f"undisturbed {dtype}"))
        print(name, results[name], len(a), np.abs(a - b).max() if len(a) == len(b) else None)
