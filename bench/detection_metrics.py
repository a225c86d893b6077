"""Time of frame-mAP on tables of the size of AVA's validation set: python bench/detection_metrics.py

Made up: keyframes with one to four persons, each with one to three of the evaluated classes, and rows of detections
about these persons' boxes, of any class and score. What is timed is all that stands between tables and numbers.
"""

import argparse
import time

import numpy as np

from pretrain.metrics.detection import PROTOCOLS, STRICT, BoxTable, frame_map

KEYFRAMES, CLASSES = 57_000, 60


def made_up(keyframes: int, rows: int, seed: int) -> tuple[BoxTable, BoxTable]:
    """Make truth and detections whose boxes lie about the true ones; keyframes are named as video and second."""
    random = np.random.default_rng(seed)
    persons = np.repeat(np.arange(keyframes), random.integers(1, 5, keyframes))
    low = random.random((len(persons), 2)) * 0.6
    boxes = np.concatenate([low, low + 0.1 + random.random((len(persons), 2)) * 0.3], axis=1)
    names = [(f"video{number // 897:03d}", 902 + number % 897) for number in range(keyframes)]
    of_person = np.repeat(np.arange(len(persons)), random.integers(1, 4, len(persons)))
    labels = random.integers(0, CLASSES, len(of_person))
    truth = BoxTable([names[persons[one]] for one in of_person], boxes[of_person], labels)
    found = random.integers(0, len(persons), rows)
    moved = boxes[found] + random.normal(0, 0.02, (rows, 4))
    return truth, BoxTable([names[persons[one]] for one in found], moved, random.integers(0, CLASSES, rows),
                           random.random(rows))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keyframes", type=int, default=KEYFRAMES)
    parser.add_argument("--rows", type=int, default=2_000_000, help="detections, a row a box and class")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    truth, detections = made_up(arguments.keyframes, arguments.rows, arguments.seed)
    print(f"{arguments.keyframes} keyframes, {len(truth)} rows of truth, {len(detections)} of detections")
    for variant in PROTOCOLS:
        for thresholds in ((0.5,), STRICT):
            start, start_cpu = time.perf_counter(), time.process_time()
            result = frame_map(truth, detections, range(CLASSES), variant, thresholds=thresholds)
            print(f"{variant:12} {len(thresholds):2} thresholds: {time.perf_counter() - start:6.1f} s, processor "
                  f"{time.process_time() - start_cpu:6.1f} s, mAP {result.mean:.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
