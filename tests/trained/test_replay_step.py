"""launch/replay.py on runs of two ranks: the same batch, the same losses, and the module that went wrong."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.commands import replay
from pretrain.checkpoint.manifest import Manifest, describe_file, read_manifest, write_manifest
from pretrain.models.gradient_limits import LossScale
from tests.toy_run import train

ROOT = Path(__file__).resolve().parents[2]
BROKEN = "model.encoder.blocks.1.norm2"


@pytest.fixture(scope="module")
def runs(toy: Any) -> dict[str, Path]:
    """Two ranks, two micro-batches each a step; the first of step 6 on rank 1 gave NaN."""
    plan = {
        f"replayed {stage}": {
            "overrides": ["batch.micro=2", f"zero.stage={stage}", "checkpoint.every_steps=5", "schedule.max_steps=7"],
            "accidents": [[11, 1, "nan"]],
        }
        for stage in (2, 0)
    }
    assert set(toy.drive(plan, ranks=2).values()) == {0}
    return {name: toy.folder / name for name in plan}


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    """The command is a program of its own; here it shares the process with other tests."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def report(run: Path, step: int = 6) -> list[dict[str, Any]]:
    """The micro-batches of replay's report."""
    content = json.loads((run / "incidents" / f"replay_step_{step:08d}.json").read_text())
    micro_batches: list[dict[str, Any]] = content["micro_batches"]
    return micro_batches


def test_losses_are_the_run_s_own_to_the_bit_on_one_process(runs: dict[str, Path]) -> None:
    run = runs["replayed 2"]
    output = train([ROOT / "launch" / "replay.py", run, "6"], 1, run)
    assert "2 ranks; weights:" in output and "step_00000005" in output and "older" not in output
    assert "everything is finite" in output
    recorded = json.loads((run / "incidents" / "step_00000006.json").read_text())["ranks"]
    told = [batch for rank in recorded for batch in rank["micro_batches"]]
    replayed = report(run)
    assert len(replayed) == len(told) == 4
    for mine, theirs in zip(replayed, told, strict=True):
        assert mine["keys"] == [sample["key"] for sample in theirs["samples"]]
        assert mine["positions"] == [sample["position"] for sample in theirs["samples"]]
    sound = [0, 1, 3]  # the third got its NaN from the test
    assert [replayed[n]["loss"] for n in sound] == [told[n]["loss"] for n in sound]
    assert np.isfinite(replayed[2]["loss"]) and told[2]["loss"] == "nan"
    assert (run / "incidents" / "replay_step_00000006_video.png").is_file()


def test_older_weights_are_said_to_be_older(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(runs["replayed 0"]), "3", "--rank", "1"]) == 0
    output = capsys.readouterr().out
    assert "first weights" in output and "2 updates older" in output
    assert [batch["rank"] for batch in report(runs["replayed 0"], 3)] == [1, 1]


def broken_copy(run: Path, target: Path, parameter: str, value: float) -> Path:
    """The run with one value of its checkpoint of step 5 changed, and a manifest that says so."""
    shutil.copytree(run, target)
    folder = target / "checkpoints" / "step_00000005"
    weights = folder / "deepspeed" / "mp_rank_00_model_states.pt"
    content = torch.load(weights, weights_only=False)
    content["module"][parameter].fill_(value)
    torch.save(content, weights)
    manifest = read_manifest(folder)
    write_manifest(folder, Manifest(manifest.step, tuple(describe_file(folder, file.path) for file in manifest.files)))
    return target


@pytest.mark.parametrize(("value", "phase"), [(3e38, "forward"), (float("inf"), "weights")])
def test_the_first_module_that_overflows_is_named(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, phase: str
) -> None:
    run = broken_copy(runs["replayed 0"], tmp_path / "run", f"{BROKEN}.weight", value)
    assert replay.main([str(run), "6"]) == 0
    output = capsys.readouterr().out
    assert f"first non-finite: {BROKEN} ({phase})" in output
    [batch] = report(run)
    assert (batch["finding"]["module"], batch["rank"], batch["micro"]) == (BROKEN, 0, 0)
    assert batch["activations"]["model.encoder.blocks.1.attn"]["nonfinite"] == 0
    assert batch["activations"][BROKEN]["nonfinite"] > 0
    assert all(key in output for key in batch["keys"])


def test_a_loss_that_overflows_by_itself_is_the_objective_s(runs: dict[str, Path], tmp_path: Path) -> None:
    run = broken_copy(runs["replayed 0"], tmp_path / "run", "model.decoder.head.weight", 1e25)
    assert replay.main([str(run), "6"]) == 0
    finding = report(run)[0]["finding"]
    assert (finding["phase"], finding["module"]) == ("forward", "objective")


def test_limits_on_gradients_know_the_rows_of_a_micro_batch(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a clamp that is published for a mean over so many rows would be another one than in the run."""
    scale = LossScale()
    monkeypatch.setattr("pretrain.trained.replay_step.follow_loss_scale", lambda objective: scale)
    assert replay.main([str(runs["replayed 0"]), "6"]) == 0
    assert (scale.value, scale.rows) == (1.0, len(report(runs["replayed 0"])[0]["keys"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [(["nowhere", "6"], "not a run folder"), (["RUN", "0"], "counted from 1"), (["RUN", "6", "--rank", "2"], "0 to 1")],
)
def test_what_cannot_be_replayed_is_refused(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    code = replay.main([word.replace("RUN", str(runs["replayed 0"])) for word in words])
    assert code == (1 if words[0] == "nowhere" else 2)
    assert message in capsys.readouterr().err
