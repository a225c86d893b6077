"""AVA frame-mAP beside the official evaluators: every variant that expected.json lists, by class."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.metrics.detection import PROTOCOLS, BoxTable, frame_map, strict_precision

KINDS = ("ava_map",)

Key = tuple[str, float]


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def table_of(path: Path, scored: bool) -> tuple[BoxTable, list[Key]]:
    """Boxes of a csv, and the keyframes that it lists without any."""
    rows = rows_of(path)
    full = [row for row in rows if len(row) > 2]
    numbers = np.array([[float(value) for value in row[2:6]] for row in full])
    labels = np.array([int(row[6]) for row in full])
    scores = np.array([float(row[7]) for row in full]) if scored else None
    keys = [(row[0], float(row[1])) for row in full]
    return BoxTable(keys, numbers, labels, scores), [(row[0], float(row[1])) for row in rows if len(row) == 2]


def names_of(path: Path) -> dict[str, int]:
    items = re.findall(r'name:\s*"(.*?)"\s*id:\s*(\d+)', path.read_text())
    return {name: int(number) for name, number in items}


def found(case: Any, truth_file: str, variant: str) -> Any:
    truth, listed = table_of(case.folder / truth_file, scored=False)
    detections, _ = table_of(case.folder / "detections.csv", scored=True)
    excluded = [(row[0], float(row[1])) for row in rows_of(case.folder / "excluded.csv")]
    names = names_of(case.folder / "labelmap.pbtxt")
    if variant == "evad_strict":
        return strict_precision(truth, detections, names.values(), excluded=excluded)
    excluded = excluded if PROTOCOLS[variant].exclusions else []
    return frame_map(truth, detections, names.values(), variant, listed=listed, excluded=excluded)


def test_every_variant(case: Any) -> None:
    expected = json.loads((case.folder / "expected.json").read_text())
    names = names_of(case.folder / "labelmap.pbtxt")
    assert expected
    for entry, numbers in expected.items():
        variant, _, with_what = entry.partition("_with_")
        result = found(case, f"groundtruth_with_{with_what}.csv" if with_what else "groundtruth.csv", variant)
        if variant == "evad_strict":
            assert result == pytest.approx(numbers, abs=100 * case.meta["tolerance"]), entry
            continue
        assert result.mean == pytest.approx(numbers["mAP"], abs=case.meta["tolerance"]), entry
        by_name = {name: result.by_class[number] for name, number in names.items()}
        assert by_name == pytest.approx(numbers["per_class"], abs=case.meta["tolerance"]), entry
