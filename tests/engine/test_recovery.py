"""Bad steps on two ranks, under each policy and ZeRO stage: what is done, what is written down, how the run goes on."""

import json
from typing import Any

import numpy as np
import pytest

STEPS = 10
#: A spike is told from the third step on.
SPIKES = ("guard.window=4", "guard.z=20")


def plain(*overrides: str, accidents: list[list[Any]] | None = None) -> dict[str, Any]:
    """One run for toy_driver.py; a step is one micro-batch of each rank."""
    return {"overrides": ["batch.micro=4", *overrides], "accidents": accidents or []}


def runs() -> dict[str, dict[str, Any]]:
    """The plan; stage 3 comes last (see test_ranks.py)."""
    plan: dict[str, dict[str, Any]] = {}
    for stage in range(4):
        here = f"zero.stage={stage}"
        if stage == 3:
            plan |= on_one_stage()
        spike = [[6, 1, "spike"]]
        plan[f"nan skipped {stage}"] = plain(here, accidents=[[6, 1, "nan"]])
        plan[f"spike skipped {stage}"] = plain(here, *SPIKES, "guard.spike=skip", accidents=spike)
        if stage > 1:
            plan[f"spike rewound {stage}"] = plain(here, *SPIKES, "guard.spike=rewind", accidents=spike)
        plan[f"nan rewound {stage}"] = plain(here, "guard.nonfinite=rewind", accidents=[[6, 0, "nan"]])
    return plan


def on_one_stage() -> dict[str, dict[str, Any]]:
    """Runs that one stage is enough for."""
    two, plan = "zero.stage=2", {}
    lower = ("guard.lower_lr_factor=0.5", "guard.lower_lr_steps=3")
    plan["sound"] = plain(two)
    plan["spike recorded"] = plain(two, *SPIKES, accidents=[[6, 1, "spike"]])
    plan["spike ignored"] = plain(two, *SPIKES, "guard.spike=ignore", accidents=[[6, 1, "spike"]])
    plan["spike stopped"] = plain(two, *SPIKES, "guard.spike=stop", accidents=[[6, 1, "spike"]])
    plan["bf16"] = plain(two, "compute.dtype=bf16", *SPIKES, "guard.spike=rewind", accidents=[[6, 1, "spike"]])
    plan["bf16 skipped"] = plain(two, "compute.dtype=bf16", accidents=[[6, 1, "nan"]])
    plan["lowered"] = plain(two, "guard.nonfinite=lower_lr", *lower, accidents=[[5, 0, "gradient"]])
    plan["unsharded"] = plain("zero.stage=0", accidents=[[5, 0, "gradient"]])
    plan["no checkpoint"] = plain(two, "guard.nonfinite=rewind", accidents=[[2, 0, "nan"]])
    # Two steps are left out, 6 and 7; call 8 is step 5 again, call 9 step 8.
    plan["rewinds spent"] = plain(
        two,
        "guard.nonfinite=rewind",
        "guard.leave_out=2",
        "guard.max_rewinds=1",
        accidents=[[7, 0, "nan"], [9, 0, "nan"]],
    )
    return plan


@pytest.fixture(scope="module")
def outcome(toy: Any) -> dict[str, int | str]:
    """Exit code, or error, of each run."""
    results: dict[str, int | str] = toy.drive(runs(), ranks=2)
    return results


def incident(toy: Any, name: str, step: int = 6) -> dict[str, Any]:
    """The record of a bad step."""
    content: dict[str, Any] = json.loads((toy.folder / name / "incidents" / f"step_{step:08d}.json").read_text())
    return content


def curve(toy: Any, name: str) -> dict[int, tuple[Any, Any]]:
    """Loss and gradient norm of the steps that were trained on."""
    return {
        record["step"]: (record["train/loss"], record["optim/grad_norm"])
        for record in toy.records(name)
        if not record["optim/skipped"]
    }


@pytest.mark.parametrize("stage", range(4))
def test_a_spike_is_known_before_the_update_and_left_out_like_a_nan(toy: Any, outcome: Any, stage: int) -> None:
    assert (outcome[f"spike skipped {stage}"], outcome[f"nan skipped {stage}"]) == (0, 0)
    spike = curve(toy, f"spike skipped {stage}")
    assert list(spike) == [1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert spike == curve(toy, f"nan skipped {stage}")
    assert spike[7] != curve(toy, "sound")[7]
    assert incident(toy, f"spike skipped {stage}")["update"] == "left out"


@pytest.mark.parametrize(("what", "stage"), [*(("nan", stage) for stage in range(4)), ("spike", 2), ("spike", 3)])
def test_after_a_rewind_the_run_is_as_if_the_step_had_been_skipped(
    toy: Any, outcome: Any, what: str, stage: int
) -> None:
    name = f"{what} rewound {stage}"
    assert outcome[name] == 0
    assert curve(toy, name) == curve(toy, f"nan skipped {stage}")
    records = toy.records(name)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records if record.get("guard/skipped_step")] == [6]
    assert incident(toy, name)["rewound_to"] == 4
    assert json.loads((toy.folder / name / "guard.json").read_text()) == {"rewinds": 1, "skipped_steps": [5]}


def test_bf16_rewinds_too(toy: Any, outcome: Any) -> None:
    assert (outcome["bf16"], outcome["bf16 skipped"]) == (0, 0)
    assert curve(toy, "bf16") == curve(toy, "bf16 skipped")


def test_a_recorded_spike_changes_nothing(toy: Any, outcome: Any) -> None:
    assert (outcome["spike recorded"], outcome["spike ignored"]) == (0, 0)
    recorded = curve(toy, "spike recorded")
    assert list(recorded) == list(range(1, STEPS + 1)) and recorded == curve(toy, "spike ignored")
    assert not (toy.folder / "spike ignored" / "incidents").exists()
    record = incident(toy, "spike recorded")
    assert (record["kind"], record["action"], record["update"]) == ("spike", "record", "applied")
    assert record["spike"]["z"] > 20
    squares = sum(row["gradients"] ** 2 for row in record["modules"].values())
    assert np.isclose(np.sqrt(squares), record["grad_norm"], rtol=1e-4), "norms by module make up the whole norm"


def test_the_record_names_every_sample(toy: Any, outcome: Any) -> None:
    record = incident(toy, "nan skipped 3")
    assert [rank["rank"] for rank in record["ranks"]] == [0, 1]
    samples = [sample for rank in record["ranks"] for sample in rank["micro_batches"][0]["samples"]]
    # Step 6 is the first of the second epoch: its positions are the first ones.
    assert sorted(sample["position"] for sample in samples) == list(range(8))
    assert {(sample["epoch"], sample["source"], sample["view"]) for sample in samples} == {(1, "toy", 0)}
    assert len({sample["key"] for sample in samples}) == 8
    losses = [rank["micro_batches"][0]["loss"] for rank in record["ranks"]]
    assert isinstance(losses[0], float) and losses[1] == "nan"
    assert all(row["weights"] >= 0 and row["weights_nonfinite"] == 0 for row in record["modules"].values())
    assert all(row["gradients_nonfinite"] for name, row in record["modules"].items() if "encoder" in name)


def test_norms_of_weights_do_not_depend_on_how_they_are_sharded(toy: Any, outcome: Any) -> None:
    norms = [
        [row["weights"] for row in incident(toy, f"nan skipped {stage}")["modules"].values()] for stage in range(4)
    ]
    for others in norms[1:]:
        np.testing.assert_allclose(others, norms[0], rtol=1e-4)


def test_the_rate_is_lowered_for_three_steps(toy: Any, outcome: Any) -> None:
    assert outcome["lowered"] == 0
    factors = [
        lowered["optim/lr"] / max(whole["optim/lr"], 1e-30)
        for lowered, whole in zip(toy.records("lowered"), toy.records("sound"), strict=True)
    ]
    assert np.round(factors[1:], 6).tolist() == [1, 1, 1, 1, 0.5, 0.5, 0.5, 1, 1]
    record = incident(toy, "lowered", 5)
    assert (record["kind"], record["action"]) == ("gradient", "lower_lr")
    assert "replay" in record["gradients"]


def test_without_zero_the_record_has_the_gradient_that_was_not_finite(toy: Any, outcome: Any) -> None:
    modules = incident(toy, "unsharded", 5)["modules"]
    assert [name for name, row in modules.items() if row["gradients_nonfinite"]] == ["model"]


def test_policies_that_end_the_run_leave_a_record(toy: Any, outcome: Any) -> None:
    assert outcome["spike stopped"].startswith("TrainingError: step 6: the loss")
    assert incident(toy, "spike stopped")["action"] == "stop"
    assert [record["step"] for record in toy.records("rewinds spent") if "guard/skipped_step" in record] == [6, 7]
    assert (
        "TrainingError: step 8: the loss is not finite, the run went back 1 times already (guard.max_rewinds = 1)"
        in outcome["rewinds spent"]
    )


def test_before_the_first_checkpoint_a_rewind_is_a_skip(toy: Any, outcome: Any) -> None:
    assert outcome["no checkpoint"] == 0
    record = incident(toy, "no checkpoint", 2)
    assert (record["asked"], record["action"]) == ("rewind", "skip")
    assert [record["optim/skipped"] for record in toy.records("no checkpoint")] == [0, 1, *[0] * 8]


def test_kill_9_after_interventions_changes_nothing(toy: Any) -> None:
    """A spike lowers the rate, a NaN sends the run back, then it dies before the next checkpoint."""
    options = [*SPIKES, "guard.spike=lower_lr", "guard.lower_lr_steps=6", "guard.nonfinite=rewind"]
    options += ["schedule.epochs=4", "zero.stage=1", "batch.micro=8"]
    bad = [[6, 0, "spike"], [11, 0, "nan"]]
    whole = {"whole": {"overrides": options, "accidents": bad}}
    assert toy.drive(whole, ranks=1) == {"whole": 0}
    # Call 14 is step 12: 11 steps, then 9 and 10 again.
    dies = {"dies": {"overrides": options, "accidents": [*bad, [14, 0, "SIGKILL"]]}}
    assert toy.drive(dies, ranks=1, expect=-9) == {}
    assert toy.checkpoints("dies") == ["step_00000004", "step_00000008"]
    toy.train("dies", *options)
    keys = ("step", "optim/lr", "optim/skipped", "train/loss", "optim/grad_norm")
    died, alone = ([[record.get(key) for key in keys] for record in toy.records(name)] for name in ("dies", "whole"))
    assert died == alone
    assert [record[0] for record in alone if record[2]] == [6, 11]
    states = [
        json.loads((toy.folder / name / "checkpoints" / "step_00000020" / "state.json").read_text())["guard"]
        for name in ("dies", "whole")
    ]
    assert states[0] == states[1] and states[0]["skipped_steps"] == [10]
