"""Rules for the frames of a labelled clip."""

import hashlib
import pickle
from itertools import product

import numpy as np
import pytest

from finetune.classification.frame_facts import choice_of, facts_of
from pretrain.data.randomness import generator
from pretrain.errors import WeightsError
from pretrain.samples.augmented_clip import Config
from pretrain.samples.frame_choice import VideoFacts

LENGTHS = (1, 2, 5, 15, 16, 17, 48, 49, 64, 65, 100, 301)


@pytest.mark.parametrize(
    ("sampling", "digest"),
    [
        ("dense", "7195a2179f62ac28f91636adc681e90a"),
        ("sparse", "43f3cff959b8cf1bec7d4d2fc7614093"),
        ("strided", "c5fd604c616853e3a7015c0a58ba5523"),
    ],
)
def test_frames_are_those_of_before_there_were_rules(sampling: str, digest: str) -> None:
    """Of every length, with what is left of the generator: taken down before rules became classes."""
    found = hashlib.sha256()
    for frames, stride, length in product((1, 4, 16), (1, 3, 4), LENGTHS):
        rule = Config(frames=frames).frame_choice(sampling, stride)
        video, rng = VideoFacts(length), generator(length, "x")
        chosen = [rule.training(video, rng), rule.validation(video)]
        chosen += [rule.clips(video, clips, generator("not used")) for clips in (1, 2, 5)]
        for indices in chosen:
            assert indices.dtype == np.int64
            found.update(str(indices.shape).encode() + indices.tobytes())
        found.update(str(rng.integers(1000)).encode())
    assert found.hexdigest()[:32] == digest


def test_training_frames() -> None:
    dense, sparse = (Config(frames=16).frame_choice(sampling, None) for sampling in ("dense", "sparse"))
    drawn = [dense.training(VideoFacts(100), generator(seed)) for seed in range(200)]
    ends = {int(indices[-1]) for indices in drawn}
    assert min(ends) == 63 and max(ends) == 98, "exclusive end uniform over 64 ... 99"
    assert all(len(indices) == 16 and (np.diff(indices) >= 4).all() for indices in drawn)
    for seed in range(50):
        indices = sparse.training(VideoFacts(50), generator(seed))
        assert (indices // 3 == np.arange(16)).all(), "one frame of each segment"
    for frames in (1, 5, 15, 16, 64, 65):
        for rule in (dense, sparse):
            for indices in (rule.training(VideoFacts(frames), generator(0)), rule.validation(VideoFacts(frames))):
                assert len(indices) == 16 and indices.min() >= 0 and indices.max() < frames


@pytest.mark.parametrize("sampling", ["dense", "sparse", "strided"])
def test_a_rule_travels(sampling: str) -> None:
    rule = Config(frames=8, stride=3).frame_choice(sampling, None)
    assert pickle.loads(pickle.dumps(rule)) == rule
    facts = {"clip": [8, 32, 32]} | facts_of(rule)
    assert facts["sampling"] == sampling and choice_of(facts, "a.onnx") == rule
    # As written before: always a stride, and the length in `clip`.
    assert choice_of({"clip": [8, 32, 32], "sampling": sampling, "stride": 3}, "a.onnx") == rule


def test_a_rule_of_a_graph_that_is_not_known_is_refused() -> None:
    facts = {"clip": [8, 32, 32], "sampling": "nearest"}
    with pytest.raises(WeightsError, match="a.onnx: frames are chosen by 'nearest', allowed: dense, sparse, strided"):
        choice_of(facts, "a.onnx")
    with pytest.raises(WeightsError, match="a.onnx: says nothing of stride; write it again"):
        choice_of(facts | {"sampling": "dense"}, "a.onnx")
