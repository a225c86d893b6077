"""Runs whose checkpoints go to a real S3 server: they go on from there when the local disk is lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

OPTIONS = ("zero.stage=2", "checkpoint.every_steps=3", "checkpoint.upload_deadline_s=60")
URL = "s3://bucket/runs/toy"


def manifests(bucket: Path) -> list[str]:
    """Steps whose checkpoints are complete in the bucket."""
    return sorted(path.parent.name for path in bucket.glob("runs/toy/checkpoints/*/manifest.json"))


@pytest.fixture(scope="module")
def undisturbed(toy: Any) -> list[float]:
    """Losses of a run that was left alone."""
    toy.train("undisturbed", *OPTIONS, ranks=2)
    losses: list[float] = toy.losses("undisturbed")
    return losses


def test_a_run_that_lost_its_folder_goes_on_from_the_bucket(toy: Any, s3_server: Any, undisturbed: list[float]) -> None:
    upload = f"checkpoint.upload={URL}"
    toy.train("lost", *OPTIONS, upload, "schedule.max_steps=6", ranks=2)
    assert manifests(s3_server.bucket) == ["step_00000003", "step_00000006"]
    shutil.rmtree(toy.folder / "lost")
    newest = s3_server.bucket / "runs/toy/checkpoints/step_00000006"
    states = next((newest / "deepspeed").glob("*optim_states.pt"))
    states.write_bytes(states.read_bytes()[:-1])  # cut in the store: the one before it must serve
    output = toy.train("lost", *OPTIONS, upload, ranks=2)
    assert "step_00000006 can't be restored and is passed over" in output
    assert "checkpoint of step 3 restored from s3://" in output
    assert toy.losses("lost") == undisturbed
    assert manifests(s3_server.bucket) == ["step_00000009", "step_00000010"]


def test_a_store_that_is_down_does_not_stop_training_but_the_end_tells(
    toy: Any, s3_server: Any, undisturbed: list[float]
) -> None:
    s3_server.stop()
    options = [*OPTIONS[:2], "checkpoint.upload_deadline_s=3", f"checkpoint.upload={URL}"]
    refused = toy.train("outage", *options, expect=1)
    assert "can't be listed" in refused and "checkpoint.upload=null" in refused
    toy.train("outage", *OPTIONS, "schedule.max_steps=3", ranks=2)
    output = toy.train("outage", *options, ranks=2, expect=1)
    assert "NOT UPLOADED" in output and "start the same command again" in output
    assert toy.losses("outage") == undisturbed
    report = json.loads((toy.folder / "outage" / "uploads.json").read_text())
    assert report["uploaded"] == [] and "10" in report["failed"]
    s3_server.start()
    output = toy.train("outage", *options, ranks=2)
    assert "finished, 10 of 10 steps" in output
    assert manifests(s3_server.bucket) == ["step_00000009", "step_00000010"]
