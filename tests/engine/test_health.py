"""The health signal: measures what it says, on any number of ranks, and leaves the training as it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.data.members import Members
from pretrain.data.samples import Arrays, Batch, Place, Samples, SourceInfo
from pretrain.engine.health import HealthSignal, open_health
from pretrain.errors import DataError, RecipeError
from pretrain.objectives.base import Objective, method_of, problems_of, warnings_of
from pretrain.recipe.load import load_recipe
from pretrain.runtime.process_group import Ranks
from tests.toy_shards import encoded, index, write_shard

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
LABELS = ["dark", "bright", "dark", "dark", "dark", "bright", "dark", None]


def grey(level: int) -> bytes:
    return encoded([np.full((48, 48, 3), level, dtype=np.uint8)] * 10)


def pack(toy: Any, name: str, labels: list[str | None]) -> Path:
    folder: Path = toy.folder / name
    folder.mkdir()
    levels = [200 + number if label == "bright" else 20 + number for number, label in enumerate(labels)]
    samples = [(f"{n:04d}", {"label": label}, grey(levels[n])) for n, label in enumerate(labels)]
    write_shard(folder / "grey-000000.tar", samples)
    index(folder)
    return folder


@pytest.fixture(scope="module")
def labelled(toy: Any) -> Path:
    """Eight videos, dark or bright as their labels say; the last has no label."""
    return pack(toy, "labelled", LABELS)


class Brightness(Objective):
    """Features are known: brightness above and below the middle; or nothing at all."""

    def __init__(self, blind: bool = False) -> None:
        super().__init__()
        self.blind, self.clips = blind, 0

    def features(self, batch: Batch) -> torch.Tensor:
        video = batch["video"]
        assert video.dtype == torch.uint8 and video.shape[1:] == (8, 32, 32, 3)
        self.clips += len(video)
        light = video.float().mean((1, 2, 3, 4)) - 128
        return torch.stack([light.relu(), (-light).relu()], 1) * (not self.blind) + 1e-3


def test_signal_is_the_accuracy_of_the_features(toy: Any, labelled: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = load_recipe(str(toy.recipe), [f"health.shards={labelled}", "health.neighbours=2"])
    objective = Brightness()
    signal = open_health(method_of(recipe), ALONE, objective)
    assert signal is not None
    assert signal(objective) == {"knn_top1": 100, "largest_class": pytest.approx(500 / 7), "videos": 7}
    assert objective.clips == 7 and "0007 can't be used: label" in caplog.text
    recipe.health.neighbours = 6
    assert signal(Brightness(blind=True))["knn_top1"] == pytest.approx(500 / 7), "collapsed: the largest class for all"


def test_set_that_can_not_be_used_is_an_error(toy: Any) -> None:
    unlabelled = pack(toy, "unlabelled", [None, "dark"])
    signal = HealthSignal(method_of(load_recipe(str(toy.recipe), [f"health.shards={unlabelled}"])), ALONE)
    with pytest.raises(DataError, match="1 of its videos can be read"):
        signal(Brightness())
    with pytest.raises(DataError, match="no_such_folder"):
        HealthSignal(method_of(load_recipe(str(toy.recipe), ["health.shards=no_such_folder"])), ALONE)


def test_method_without_features_is_refused(toy: Any) -> None:
    recipe = load_recipe(str(toy.recipe), ["health.shards=anywhere"])
    with pytest.raises(RecipeError, match="has no `features`"):
        open_health(method_of(recipe), ALONE, Objective())
    recipe.health.shards = None
    assert open_health(method_of(recipe), ALONE, Objective()) is None


class Bare(Samples):
    """Only what a kind of sample must have."""

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        return {"video": np.zeros((1, 8, 32, 32, 3), np.uint8)}

    def example(self, count: int) -> Batch:
        raise NotImplementedError


def test_samples_that_can_not_be_judged_are_refused_at_the_start(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of(load_recipe(str(toy.recipe), ["health.shards=anywhere"]))
    monkeypatch.setattr(method, "samples", Bare)
    with pytest.raises(RecipeError, match="health.shards: samples of input.name=clip have no `without_chance`"):
        open_health(method, ALONE, Brightness())


def test_keys_are_checked(toy: Any) -> None:
    recipe = load_recipe(str(toy.recipe), ["health.every_epochs=0", "health.neighbours=-1"])
    problems = problems_of(method_of(recipe))
    assert any("health.every_epochs" in line for line in problems) and any("neighbours" in line for line in problems)
    assert any("health has no effect" in line for line in warnings_of(method_of(recipe)))
    assert not any("health" in line for line in warnings_of(method_of(load_recipe(str(toy.recipe)))))
    assert problems_of(method_of(load_recipe(str(toy.recipe), ["health.shards=anywhere"]))) == []


def test_features_are_those_of_the_whole_clip(toy: Any) -> None:
    torch.manual_seed(0)
    objective = method_of(load_recipe(str(toy.recipe))).build().eval()
    video = torch.randint(256, (3, 8, 32, 32, 3), dtype=torch.uint8)
    features = objective.features({"video": video})
    assert features.shape == (3, 32) and features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(objective.features({"video": video[1:2]}), features[1:2], rtol=1e-4, atol=1e-5)
    for corner in ((0, 0, 0), (7, 31, 31)):  # no part of the clip is hidden from it
        changed = video.clone()
        changed[:, corner[0], corner[1], corner[2]] ^= 255
        assert (objective.features({"video": changed}) - features).abs().max() > 1e-6


def plan(toy: Any, labelled: Path) -> dict[str, dict[str, Any]]:
    runs = {}
    for stage in (0, 3):  # stage 3 last: DeepSpeed never puts torch.nn.functional.linear back
        base = [f"zero.stage={stage}", "checkpoint.every_steps=4", "model.drop_path=0.2"]
        # With weights in shards and one video at a time, rank 1 has a video less than rank 0 and would hang.
        base += ["batch.micro=1"] if stage == 3 else []
        shards = labelled if stage == 3 else toy.folder / "shards"
        watch = [f"health.shards={shards}", "health.every_epochs=0.4"]
        runs[f"plain {stage}"] = {"overrides": base}
        runs[f"watched {stage}"] = {"overrides": base + watch}
        if stage == 0:
            runs["stopped"] = {"overrides": [*base, *watch, "schedule.max_steps=5"]}
            runs["continued"] = {"overrides": [*base, *watch, f"run.dir={toy.folder / 'stopped'}"]}
    return runs


@pytest.fixture(scope="module")
def outcome(toy: Any, labelled: Path) -> None:
    results = toy.drive(plan(toy, labelled), ranks=2)
    assert set(results.values()) == {0}, results


def trained(toy: Any, name: str) -> list[float]:
    return [record["train/loss"] for record in toy.records(name) if "train/loss" in record]


def measured(toy: Any, name: str) -> dict[int, float]:
    return {record["step"]: record["health/knn_top1"] for record in toy.records(name) if "health/knn_top1" in record}


@pytest.mark.parametrize("stage", (0, 3))
def test_training_is_the_same_with_and_without(toy: Any, outcome: None, stage: int) -> None:
    assert trained(toy, f"watched {stage}") == trained(toy, f"plain {stage}") and len(trained(toy, "plain 0")) == 10
    found = measured(toy, f"watched {stage}")
    assert list(found) == [2, 4, 6, 8, 10] and not measured(toy, f"plain {stage}")
    assert toy.checkpoints(f"watched {stage}") == toy.checkpoints(f"plain {stage}"), "no checkpoint depends on it"
    sizes = {record["health/videos"] for record in toy.records(f"watched {stage}") if "health/videos" in record}
    assert sizes == {40 if stage == 0 else 7}


def test_stopped_and_continued_is_the_same(toy: Any, outcome: None) -> None:
    assert trained(toy, "stopped") == trained(toy, "watched 0")
    found = measured(toy, "stopped")
    assert {step: found[step] for step in (2, 4, 6, 8, 10)} == measured(toy, "watched 0")


def test_two_ranks_measure_what_one_does(toy: Any, outcome: None) -> None:
    from pretrain.trained.load_run import load_trained

    recipe = load_recipe(str(toy.recipe), [f"health.shards={toy.folder / 'shards'}"])
    objective = load_trained(toy.folder / "watched 0").objective
    assert HealthSignal(method_of(recipe), ALONE)(objective)["knn_top1"] == measured(toy, "watched 0")[10]
