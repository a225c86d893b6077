"""Official TDN: frames of segments in validation, and in training with the draws of the files."""

from typing import Any

import numpy as np

from pretrain.samples.frame_choice import VideoFacts
from pretrain.samples.segments import Config

KINDS = ("tdn_frames",)


class Recorded:
    """A generator that gives the draws of a file."""

    def __init__(self, draws: list[dict[str, Any]]) -> None:
        self.draws = list(draws)

    def integers(self, high: int, size: int) -> np.ndarray:
        one = self.draws.pop(0)
        assert (one["high"], len(one["draw"])) == (high, size)
        return np.array(one["draw"], dtype=np.int64)


def rule(entry: dict[str, Any]) -> Any:
    window, more = divmod(len(entry["frames_1based"]), entry["segments"])
    assert not more
    return Config(segments=entry["segments"], window=window).frame_choice("sparse", None)


def test_frames_of_the_validation(case: Any) -> None:
    for entry in case.meta["data"]["validation"]:
        found = rule(entry).validation(VideoFacts(entry["num_frames"]))
        assert (found + 1).tolist() == entry["frames_1based"], entry["num_frames"]


def test_frames_of_training(case: Any) -> None:
    drawn = 0
    for entry in case.meta["data"]["train"]:
        rng: Any = Recorded(entry["random_draws"])
        found = rule(entry).training(VideoFacts(entry["num_frames"]), rng)
        assert (found + 1).tolist() == entry["frames_1based"], entry["num_frames"]
        assert not rng.draws
        drawn += len(entry["random_draws"])
    assert drawn
