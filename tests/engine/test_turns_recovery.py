"""Bad steps where a batch has two updates, on two ranks: what is left out, what is told, and how a run goes back."""

import json
from typing import Any

import pytest

#: Passes of step n: 2n - 1 for the decoder's update, 2n for the encoder's, which sees its result.
TURNS = ["decoder", "encoder"]
SPIKES = ("guard.window=4", "guard.z=20")
TWO, THREE = "zero.stage=2", "zero.stage=3"


def run(*overrides: str, accidents: list[list[Any]] | None = None) -> dict[str, Any]:
    """One run for toy_driver.py; an update is one micro-batch of each rank."""
    return {"overrides": ["batch.micro=4", *overrides], "accidents": accidents or [], "turns": TURNS}


@pytest.fixture(scope="module")
def outcome(toy: Any) -> dict[str, int | str]:
    """Exit code, or error, of each run; stage 3 comes last (see test_ranks.py)."""
    rewind, skip = "guard.nonfinite=rewind", "guard.spike=skip"
    plan = {
        "first turn skipped": run(TWO, accidents=[[11, 1, "nan"]]),
        "first turn rewound": run(TWO, rewind, accidents=[[11, 1, "nan"]]),
        "last turn rewound": run(TWO, rewind, accidents=[[12, 0, "nan"]]),
        "last turn skipped": run(TWO, accidents=[[12, 0, "nan"]]),
        "first turn spiked": run(TWO, *SPIKES, skip, accidents=[[11, 0, "spike"]]),
        "first turn recorded": run(TWO, *SPIKES, accidents=[[11, 0, "spike"]]),
        "first turn skipped 3": run(THREE, accidents=[[11, 1, "nan"]]),
        "first turn rewound 3": run(THREE, rewind, accidents=[[11, 1, "nan"]]),
    }
    results: dict[str, int | str] = toy.drive(plan, ranks=2)
    return results


def incident(toy: Any, name: str) -> dict[str, Any]:
    """The record of the bad step."""
    content: dict[str, Any] = json.loads((toy.folder / name / "incidents" / "step_00000006.json").read_text())
    return content


def curve(toy: Any, name: str) -> dict[int, tuple[Any, ...]]:
    """Losses and gradient norm of the steps that were trained on."""
    keys = ("train/loss_decoder", "train/loss_encoder", "optim/grad_norm")
    return {
        record["step"]: tuple(record[key] for key in keys)
        for record in toy.records(name)
        if not record["optim/skipped"]
    }


@pytest.mark.parametrize(
    ("rewound", "skipped"),
    [
        ("first turn rewound", "first turn skipped"),
        ("last turn rewound", "first turn skipped"),
        ("first turn rewound 3", "first turn skipped 3"),
    ],
)
def test_a_rewind_from_any_turn_leaves_the_whole_step_out(toy: Any, outcome: Any, rewound: str, skipped: str) -> None:
    """The checkpoint of step 4 was written after the encoder's turn, and is loaded in the middle of either."""
    assert (outcome[rewound], outcome[skipped]) == (0, 0)
    assert list(curve(toy, rewound)) == [1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert curve(toy, rewound) == curve(toy, skipped)
    assert incident(toy, rewound)["rewound_to"] == 4


def test_what_was_updated_before_a_bad_turn_is_told(toy: Any, outcome: Any) -> None:
    assert outcome["last turn skipped"] == 0
    last, first = incident(toy, "last turn skipped"), incident(toy, "first turn skipped")
    assert (last["turn"], last["turns_updated"], last["update"]) == ("encoder", ["decoder"], "left out")
    assert last["what"] == "the loss of turn encoder (after the update of decoder) is not finite"
    assert (first["turn"], first["turns_updated"]) == ("decoder", [])
    assert curve(toy, "last turn skipped")[7] != curve(toy, "first turn skipped")[7], "the decoder has moved on"
    batches = [(batch["turn"], batch["micro_batch"], batch["loss"]) for batch in last["ranks"][0]["micro_batches"]]
    assert [batch[:2] for batch in batches] == [("decoder", 0), ("encoder", 0)]
    assert isinstance(batches[0][2], float) and batches[1][2] == "nan"
    record = next(record for record in toy.records("last turn skipped") if record["step"] == 6)
    assert record["optim/skipped"] == 1 and record["data/bad_samples"] == 0 and record["speed/data_wait_share"] > 0


def test_a_spike_of_the_first_turn_is_left_out_with_all_that_follows(toy: Any, outcome: Any) -> None:
    assert (outcome["first turn spiked"], outcome["first turn recorded"]) == (0, 0)
    assert curve(toy, "first turn spiked") == curve(toy, "first turn skipped")
    spiked, recorded = incident(toy, "first turn spiked"), incident(toy, "first turn recorded")
    assert spiked["what"].startswith("the loss of turn decoder, ") and spiked["spike"]["z"] > 20
    assert (recorded["turn"], recorded["update"]) == ("decoder", "applied")
    assert list(curve(toy, "first turn recorded")) == list(range(1, 11))
    # The decoder's own gradients, not those of the turn that came after.
    own = {name for name in recorded["modules"] if not name.startswith("model.encoder.")}
    assert {name for name, row in recorded["modules"].items() if "gradients" in row} == own
    assert own < recorded["modules"].keys(), "weights are all there"
