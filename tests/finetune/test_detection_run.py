"""Action detection as a user runs it: train, validate, keep the best, stop, resume, test; keyframes of every rank."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.detection.actions import action_list
from finetune.detection.judging import judge, score
from finetune.held_out_sets import held_out_sets
from finetune.recipe import load_tune_recipe
from pretrain.checkpoint.consolidate import consolidated_state
from pretrain.commands.pack import main as pack
from pretrain.data.held_out import HeldOutSamples, RowsWithoutChance, held_out_loader
from pretrain.errors import DataError
from pretrain.objectives.base import method_of
from pretrain.runtime.process_group import Ranks
from pretrain.samples.boxes import BoxSamples
from tests.finetune.conftest import Toy
from tests.toy_shards import encoded, index, write_shard

HEIGHT, WIDTH, SIDE, FRAMES, RATE = 48, 64, 16, 12, 12
NAMES = ["left", "right", "red"]

RECIPE = """\
model: {name: classifier, size: custom, patch_size: 8, dim: 48, depth: 2, heads: 2, mlp_ratio: 2, classes: 3,
        drop_path: 0, pooling: token0, head_init_scale: 1, pretrain_frames: 4, pretrain_height: 32, pretrain_width: 32}
objective: {name: detection, pixels: imagenet}
input: {frames: 4, stride: 2, short_side: 48, crop: random, crop_size: 40, flip: 0, jitter: true, pad: 8,
        convention: alphaction}
data:
  sources: {toy: {shards: FOLDER/train, val: FOLDER/val}}
  lanes: 4
  shuffle_window: 4
  workers: 0
batch: {samples: 8, micro: 4}
optim: {base_lr: 0.05, base_min_lr: 0.001, layer_decay: 0.9}
schedule: {epochs: 2, warmup_epochs: 0.5}
evaluate: {every_epochs: 1, micro: 3, workers: 0}
compute: {dtype: fp32}
zero: {stage: 0}
checkpoint: {every_steps: 2, keep_last: 1}
log: {every_steps: 1, pictures_every_steps: 0, wandb: disabled, peak_tflops: 0.1}
"""


def keyframe(number: int) -> tuple[str, dict[str, Any], bytes]:
    """Two squares above each other, which move left or right and are red or blue."""
    rng = np.random.default_rng(number)
    frames = np.full((FRAMES, HEIGHT, WIDTH, 3), rng.integers(0, 60, 3), np.uint8)
    persons = []
    for row, y in enumerate((4, 28)):
        right, red = (bool(bit) for bit in rng.integers(0, 2, 2))
        at = int(rng.integers(16, 32))
        for time in range(FRAMES):
            x = at + (time - FRAMES // 2) * (2 if right else -2)
            frames[time, y : y + SIDE, x : x + SIDE] = (240, 40, 40) if red else (40, 40, 240)
        box = [at / WIDTH, y / HEIGHT, (at + SIDE) / WIDTH, (y + SIDE) / HEIGHT]
        persons.append({"box": box, "labels": [int(right)] + [2] * red, "person": row})
    detections = [{"box": one["box"], "score": 0.9} for one in persons]
    detections.append({"box": [0.0, 0.0, 0.2, 0.2], "score": 0.3})
    facts = {"video": f"film{number // 4}", "time": number, "keyframe_s": 0.5, "width": WIDTH, "height": HEIGHT,
             "classes": 3, "persons": persons, "detections": detections}  # fmt: skip
    return f"{number:04d}", {"boxes": facts}, encoded(frames, RATE)


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("detection")
    for split, numbers in (("train", range(24)), ("val", range(100, 111))):
        (folder / split).mkdir()
        half = list(numbers)[: len(numbers) // 2]
        write_shard(folder / split / "s-000000.tar", map(keyframe, half))
        write_shard(folder / split / "s-000001.tar", map(keyframe, list(numbers)[len(half) :]))
        classes = {"names": NAMES, "ids": [1, 2, 3], "evaluated": [0, 1, 2], "groups": None}
        (folder / split / "classes.json").write_text(json.dumps(classes))
    index(folder / "train", folder / "val")
    recipe = folder / "toy.yaml"
    recipe.write_text(RECIPE.replace("FOLDER", str(folder)))
    return Toy(recipe, folder)


def losses(boxed: Toy, name: str) -> list[tuple[int, float]]:
    return [(record["step"], record["train/loss"]) for record in boxed.records(name) if "train/loss" in record]


@pytest.fixture(scope="module")
def whole(boxed: Toy) -> str:
    """One uninterrupted run with averaged weights."""
    return boxed.run("whole", "ema.decay=0.5", "model.drop_path=0.2")


def test_run_from_start_to_test(boxed: Toy, whole: str) -> None:
    assert [step for step, _ in losses(boxed, "whole")] == [1, 2, 3, 4, 5, 6]
    judged = {record["step"]: record for record in boxed.records("whole") if "eval/mAP" in record}
    assert sorted(judged) == [3, 6] and all(record["eval/keyframes"] == 11 for record in judged.values())
    best = json.loads((boxed.folder / "whole" / "best.json").read_text())
    assert best["metric"] == "mAP" and best["value"] == max(record["eval/mAP"] for record in judged.values())
    folder = boxed.folder / "whole" / "predictions" / "step_00000006"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["mAP"] == scores["mAP (activitynet)"] == judged[6]["eval/mAP"]
    assert {"mAP (slowfast)", "mAP (alphaction)"} <= set(scores) and scores["keyframes"] == 11
    with (folder / "detections.csv").open() as file:
        rows = list(csv.reader(file))
    assert len(rows) == 11 * 2 * 3, "the detector's third box is below input.min_score"
    truth = keyframe(100)[1]["boxes"]["persons"]
    first = [row for row in rows if row[:2] == ["film25", "100"]]
    np.testing.assert_allclose([float(value) for value in first[0][2:6]], truth[0]["box"], atol=1e-4)
    assert [row[6] for row in first] == ["1", "2", "3"] * 2 and all(0 < float(row[7]) < 0.9 for row in rows)
    classes = (folder / "per_class.csv").read_text().splitlines()
    assert classes[0] == "id,class,persons,average_precision" and classes[3].startswith("3,red,")


def test_stopped_and_resumed_is_the_same_run(boxed: Toy, whole: str) -> None:
    words = ("ema.decay=0.5", "model.drop_path=0.2", "checkpoint.every_steps=1")
    boxed.run("parts", *words, "schedule.max_steps=3")
    boxed.run("parts", *words)
    assert losses(boxed, "parts") == losses(boxed, "whole")
    folders = [boxed.folder / name / "checkpoints" / "step_00000006" for name in ("whole", "parts")]
    one, two = map(consolidated_state, folders)
    assert any(name.startswith("average.") for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one), "averaged weights too"


@pytest.fixture
def samples(boxed: Toy) -> BoxSamples:
    recipe = load_tune_recipe(str(boxed.recipe))
    return BoxSamples(recipe.input, 0, 3, detected=True)


@pytest.mark.parametrize(("world", "micro"), [(1, 3), (2, 4), (3, 5), (4, 1)])
def test_every_keyframe_is_judged_once(boxed: Toy, samples: BoxSamples, world: int, micro: int) -> None:
    sets = held_out_sets(load_tune_recipe(str(boxed.recipe)), test=True)
    seen, most = [], 0
    for rank in range(world):
        keyframes = HeldOutSamples(sets, RowsWithoutChance(sets, samples), rank, world, micro, 60)
        batches = [one.batch for one in held_out_loader(keyframes, 0)]
        assert sum(len(batch["videos"]) for batch in batches if batch is not None) == len(keyframes)
        most = max(most, len(batches))
        assert keyframes.batches(0) >= len(batches)
        seen += [time for batch in batches if batch is not None for time in batch["times"].tolist()]
    assert sorted(seen) == list(range(100, 111)) and most == keyframes.batches(0)


def test_workers_share_what_a_rank_has(boxed: Toy, samples: BoxSamples) -> None:
    sets = held_out_sets(load_tune_recipe(str(boxed.recipe)), test=True)
    keyframes = HeldOutSamples(sets, RowsWithoutChance(sets, samples), 1, 2, 2, 60)
    each = [keyframes._positions(1, worker, 3) for worker in range(3)]
    assert sorted(position for one in each for position in one) == [1, 3, 5, 7, 9]
    assert keyframes.batches(3) == 3, "rank 0 has two in each worker"


class Oracle:
    """A detector that knows the truth."""

    def __init__(self, right: bool) -> None:
        self.right = right

    def evaluated_weights(self) -> Any:
        return torch.no_grad()

    def detect_all(self, batches: Iterable[dict[str, Any]]) -> Any:
        return [answer for batch in batches for answer in self.detect(batch)]

    def detect(self, batch: dict[str, Any]) -> Any:
        from finetune.detection.answers import truth_of
        from pretrain.samples.box_transforms import CONVENTIONS

        found = truth_of(batch, CONVENTIONS["alphaction"])
        return found if self.right else [type(one)(one.video, one.time, one.boxes, 1 - one.scores) for one in found]


def test_scores_of_who_knows_everything_and_of_who_errs(boxed: Toy, samples: BoxSamples) -> None:
    recipe = load_tune_recipe(str(boxed.recipe), ["evaluate.micro=4"])
    sets, alone = held_out_sets(recipe, test=True), Ranks(0, 1, 0, torch.device("cpu"))
    judged = judge(Oracle(True), recipe, alone, sets, samples)
    assert [one.time for one in judged.answers] == list(range(100, 111))
    assert score(judged, action_list(recipe), "activitynet").mean == 1
    wrong = judge(Oracle(False), recipe, alone, sets, samples)
    assert score(wrong, action_list(recipe), "alphaction").mean < 0.6
    with pytest.raises(DataError, match=r"11 keyframes occur twice \(the first is film25,100\)"):
        judge(Oracle(True), recipe, alone, [*sets, *sets], samples)


class Alarm(Oracle):
    """A detector that answers each person surely, and besides sees a person who does everything on each keyframe."""

    def detect(self, batch: dict[str, Any]) -> Any:
        found = super().detect(batch)
        box = np.array([[0, 0, 0.1, 0.1]], np.float32)
        return [
            type(one)(one.video, one.time, np.concatenate((one.boxes, box)),
                      np.concatenate((one.scores, np.full((1, 3), 2 if not len(one.boxes) else 0.5, np.float32))))
            for one in found
        ]  # fmt: skip


@pytest.mark.parametrize(("annotated", "mean"), [(True, 0.5), (False, 1)])
def test_false_alarms_count_where_the_annotation_lists_nobody(
    annotated: bool, mean: float, tmp_path: Path, samples: BoxSamples, boxed: Toy
) -> None:
    """ActivityNet ignores keyframes that only a detector's boxes brought in."""
    key, members, video = keyframe(100)
    persons = [members["boxes"]["persons"][0] | {"labels": [0, 1, 2]}]
    busy = members["boxes"] | {"persons": persons}
    empty = members["boxes"] | {"persons": [], "time": 101, "annotated": annotated}
    write_shard(tmp_path / "s-000000.tar", [(key, {"boxes": busy}, video), ("0101", {"boxes": empty}, video)])
    assert pack(["--index-only", str(tmp_path)]) == 0
    recipe = load_tune_recipe(str(boxed.recipe), [f"data.sources.toy.val={tmp_path}"])
    sets = held_out_sets(recipe, test=True)
    judged = judge(Alarm(True), recipe, Ranks(0, 1, 0, torch.device("cpu")), sets, samples)
    assert [one.time for one in judged.truth] == [100, 101]
    assert judged.listed == [("film25", 100.0)] + [("film25", 101.0)] * annotated
    found = {name: score(judged, action_list(recipe), name).mean for name in ("activitynet", "slowfast")}
    assert found == pytest.approx({"activitynet": mean, "slowfast": 0.5})


def test_wrong_class_lists_are_told_at_the_start(boxed: Toy) -> None:
    with pytest.raises(DataError, match="has 3 classes, but model.classes is 4; set model.classes=3"):
        method_of(load_tune_recipe(str(boxed.recipe), ["model.classes=4"])).samples()


def test_held_out_keyframes_without_detections_are_told(
    boxed: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before training, and by the evaluation itself: a score of 0 would be taken for the model's."""
    bare = [(key, {"boxes": members["boxes"] | {"detections": []}}, video)
            for key, members, video in map(keyframe, range(100, 103))]  # fmt: skip
    write_shard(tmp_path / "s-000000.tar", bare)
    assert pack(["--index-only", str(tmp_path)]) == 0
    recipe = load_tune_recipe(str(boxed.recipe), [f"data.sources.toy.val={tmp_path}"])
    told = "none of 3 held-out keyframes has a person detector's box .* objective.test_boxes=truth"
    with pytest.raises(DataError, match=told):
        method_of(recipe).samples()
    monkeypatch.setattr("finetune.detection.required_detections.PEEKED", 2)
    samples = method_of(recipe).samples()
    assert "of the first ones: evaluation: none of 2 held-out keyframes" in caplog.text
    with pytest.raises(DataError, match=told):
        judge(Given(True), recipe, Ranks(0, 1, 0, torch.device("cpu")), held_out_sets(recipe, test=False), samples)


def test_keyframes_that_do_not_fit_are_named_and_in_no_score(
    boxed: Toy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right = [keyframe(number) for number in range(100, 104)]
    first = right[1][1]["boxes"]["persons"][0]
    wrong = [{}, {"persons": [first | {"box": [0.5, 0.2, 1.5, 0.9]}]}, {"persons": [first | {"labels": [3]}]},
             {"keyframe_s": 7.5}]  # fmt: skip
    rows = [(key, {"boxes": members["boxes"] | other}, video)
            for (key, members, video), other in zip(right, wrong, strict=True)]  # fmt: skip
    write_shard(tmp_path / "s-000000.tar", rows)
    assert pack(["--index-only", str(tmp_path)]) == 0
    words = [f"data.sources.toy.val={tmp_path}"]
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    recipe = load_tune_recipe(str(boxed.recipe), words)
    samples = method_of(recipe).samples()
    judged = judge(Oracle(True), recipe, alone, held_out_sets(recipe, test=False), samples)
    assert [one.time for one in judged.truth] == [100]
    assert "evaluation: 3 of 4 keyframes can't be read and are in no score" in caplog.text
    for told in ("toy/s-000000/0101: boxes: keyframe film25,101, persons: box [0.5, 0.2, 1.5, 0.9]",
                 "toy/s-000000/0102: label: keyframe film25,102: label 3, allowed: outputs 0 to 2",
                 "toy/s-000000/0103: keyframe: keyframe film25,103: 7.5 s into a video of 1.000 s"):  # fmt: skip
        assert told in caplog.text
    recipe = load_tune_recipe(str(boxed.recipe), [*words, "data.bad_minimum=3"])
    with pytest.raises(DataError, match="3 of 4 keyframes can't be read, more than data.bad_rate="):
        judge(Oracle(True), recipe, alone, held_out_sets(recipe, test=False), samples)


class Given(Oracle):
    """A detector whose answers are the boxes that it was given."""

    def detect(self, batch: dict[str, Any]) -> Any:
        from finetune.detection.answers import answers_of
        from pretrain.samples.box_transforms import CONVENTIONS

        boxes, counts = batch["boxes"].numpy(), batch["counts"].tolist()
        return answers_of(batch, boxes, np.ones((len(boxes), 3), np.float32), counts, CONVENTIONS["alphaction"])
