"""Frozen evaluation: on features whose answer is known, and the command on real shards."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds

from finetune.commands.evaluate import main
from finetune.probe import feature_shards as shards
from finetune.probe import features
from finetune.probe.features import Features, extract, held_out_sets
from finetune.probe.few_shot import draw_shots, few_shot
from finetune.probe.heads import statistics, train_heads
from finetune.probe.windows import window_rows, window_starts
from finetune.recipe import load_tune_recipe
from pretrain.data.index import load_index, load_members
from pretrain.errors import DataError
from pretrain.metrics.neighbours import knn_scores, leave_one_out_scores
from pretrain.metrics.ranking import accuracy
from pretrain.runtime.process_group import Ranks
from tests.plain_classifier import PlainTask


def clouds(videos: int, seed: int, spread: float, tokens: int = 0) -> Features:
    """Three classes around three directions; with tokens only one token in eight carries the class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(videos) % 3
    centres = torch.eye(3, 12)[targets]
    shape = (videos, 12) if not tokens else (videos, tokens, 12)
    values = spread * torch.randn(shape, generator=generator)
    if tokens:
        place = torch.randint(tokens, (videos,), generator=generator)
        values[torch.arange(videos), place] += 4 * centres
        values = values.half()
    else:
        values += centres
    return Features([f"{n:03d}" for n in range(videos)], values, targets, ["a", "b", "c"])


def test_neighbours() -> None:
    train = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1.0]])
    votes = knn_scores(train, torch.tensor([0, 0, 2]), torch.tensor([[2.0, 0.1], [0, 5.0]]), 3, neighbours=2)
    assert votes.argmax(1).tolist() == [0, 2] and votes[0, 2] == 0, "lengths don't count, only directions"
    assert accuracy(votes, torch.tensor([0, 0])) == 50 and accuracy(votes, torch.tensor([0, 0]), 2) == 100
    train_features, held_out = clouds(90, 0, 0.2), clouds(60, 1, 0.2)
    scores = knn_scores(train_features.values, train_features.targets, held_out.values, 3)
    assert accuracy(scores, held_out.targets) > 95


def test_leaving_one_out_is_knn_among_the_others() -> None:
    features = clouds(2100, 2, 0.9)  # more than are compared at once
    votes = leave_one_out_scores(features.values, features.targets, 3, neighbours=5)
    for row in (0, 1023, 1024, 2099):
        others = torch.arange(2100) != row
        expected = knn_scores(features.values[others], features.targets[others], features.values[row : row + 1], 3, 5)
        torch.testing.assert_close(votes[row : row + 1], expected, rtol=1e-4, atol=1e-3)
    two = leave_one_out_scores(torch.eye(2), torch.tensor([0, 1]), 2)
    assert accuracy(two, torch.tensor([0, 1])) == 0, "the only neighbour is of the other class"


def test_linear_grid_learns_and_repeats() -> None:
    train, held_out = clouds(90, 0, 0.3), clouds(60, 1, 0.3)
    points = train_heads(train, held_out, "linear", epochs=20, batch=32)
    assert len(points) == 12 and points[0].top1 > 90 and points[0].top1 >= points[-1].top1
    assert points == train_heads(train, held_out, "linear", epochs=20, batch=32)
    drawn = torch.randint(3, (90,), generator=torch.Generator().manual_seed(0))
    meaningless = Features(train.keys, train.values, drawn, train.names)
    assert train_heads(meaningless, held_out, "linear", epochs=20, batch=32)[0].top1 < 65


def test_attentive_head_finds_the_token_that_counts() -> None:
    points = train_heads(clouds(120, 0, 0.3, tokens=8), clouds(60, 1, 0.3, tokens=8), "attentive", epochs=8, batch=40)
    assert points[0].top1 > 90


def test_statistics_are_those_of_all_tokens() -> None:
    values = torch.randn(300, 5, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    mean, scale = statistics(values.half())
    torch.testing.assert_close(mean, values.flatten(0, 1).mean(0), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(scale, values.flatten(0, 1).std(0), atol=1e-2, rtol=1e-2)


def test_few_shot() -> None:
    targets = np.array([0, 1, 2, 0, 1, 0, 1, 0])
    rows = draw_shots(targets, 2, seed=0, draw=0)
    assert np.bincount(targets[rows]).tolist() == [2, 2, 1]
    assert (rows == draw_shots(targets, 2, 0, 0)).all()
    assert len({tuple(draw_shots(targets, 2, 0, draw)) for draw in range(10)}) > 3
    train, held_out = clouds(90, 0, 0.5), clouds(90, 1, 0.5)
    one, many = few_shot(train, held_out, 1), few_shot(train, held_out, 25)
    assert many[0] > one[0] > 100 / 3 and many[1] < one[1]


@pytest.mark.parametrize(("frames", "expected"), [(16, [0]), (15, []), (24, [0, 4, 8]), (23, [0, 4])])
def test_windows_lie_inside_the_video(frames: int, expected: list[int]) -> None:
    assert window_starts(frames, 16, 4) == expected


def test_command_writes_what_it_measures(toy: Any) -> None:
    folder = toy.folder / "frozen"
    words = ["--recipe", str(toy.recipe), f"run.dir={folder}"]
    assert main([*words, "--method", "knn"]) == 0
    result = json.loads((folder / "frozen" / "knn.json").read_text())
    assert result["videos"] == 11 and 0 <= result["top1"] <= 100
    assert main(["--method", "few-shot", "--shots", "1,3", *words]) == 0
    assert {"1 a class", "3 a class"} < json.loads((folder / "frozen" / "few-shot.json").read_text()).keys()
    assert main([*words, "--method", "few-shot", "--shots", "0"]) == 2
    assert main([*words, "--method", "features", "--tokens"]) == 0
    tokens = np.load(folder / "features" / "held_out.npz")
    assert tokens["features"].shape == (11, 8, 48) and tokens["features"].dtype == np.float16
    assert main([*words, "--method", "windows", "--step", "4"]) == 0
    written = sorted((folder / "windows" / "toy").rglob("*.npy"))
    assert len(written) == 11 and np.load(written[0]).shape == (3, 48)


def test_any_classifier_gives_features_and_windows(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_tune_recipe(str(toy.recipe), ["input.width=48"])
    ranks, objective = Ranks(0, 1, 0, torch.device("cpu")), PlainTask(recipe).build().eval()
    sets = held_out_sets(recipe)
    tokens = 4 * 4 * 6
    assert extract(objective, recipe, ranks, sets, "pooled").values.shape == (11, 20)
    assert extract(objective, recipe, ranks, sets, "tokens").values.shape == (11, tokens, 20)
    # 14 frames: windows of 4 from 0, 4 and 8.
    found = list(window_rows(objective.model, recipe, ranks, sets, step=4))
    assert len(found) == 11 and all(row.features.shape == (3, 20) and row.facts["window"] == 4 for row in found)
    for kind, needed in (("pooled", 11 * 20 * 4), ("tokens", 11 * tokens * 20 * 2)):
        for free, fits in ((2 * needed, True), (2 * needed - 1, False)):
            monkeypatch.setattr(features.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
            try:
                extract(objective, recipe, ranks, sets, kind)  # type: ignore[arg-type]
            except DataError as error:
                assert not fits and f"{kind} features of 11 videos" in str(error)
            else:
                assert fits


def test_features_as_shards_are_read_by_webdataset(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SAMPLES", 4)
    folder = toy.folder / "frozen_shards"
    words = ["--recipe", str(toy.recipe), f"run.dir={folder}"]
    for method in (["features"], ["features", "--tokens"], ["windows", "--step", "4"]):
        assert main([*words, "--method", *method, "--shards"]) == 0
        part = folder / ("windows/shards" if method[0] == "windows" else "features/held_out")
        index = load_index(str(part))
        assert [shard.samples for shard in index.shards] == [4, 4, 3]
        paths = [str(part / shard.name) for shard in index.shards]
        samples = list(wds.WebDataset(paths, shardshuffle=False).decode())
        assert len({sample["json"]["key"] for sample in samples}) == 11
        shape = {"features": (48,), "features --tokens": (8, 48)}.get(" ".join(method), (3, 48))
        assert all(sample["npy"].shape == shape for sample in samples)
        assert all(member.startswith("toy/s-00000") for member in load_members(str(part), index.shards[0]).keys)
    assert main([*words, "--method", "features"]) == 0
    files = np.load(folder / "features" / "held_out.npz")
    assert main([*words, "--method", "features", "--shards"]) == 0
    paths = sorted(str(path) for path in (folder / "features" / "held_out").glob("*.tar"))
    found = {sample["json"]["key"]: sample for sample in wds.WebDataset(paths, shardshuffle=False).decode()}
    for key, row, target in zip(files["keys"], files["features"], files["targets"], strict=True):
        assert np.allclose(found[key]["npy"], row, atol=1e-6)
        assert found[key]["json"]["target"] == target and found[key]["json"]["class"] == files["classes"][target]
