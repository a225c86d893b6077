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


@pytest.mark.faults
def test_a_run_that_lost_its_folder_goes_on_from_the_bucket(toy: Any, s3_server: Any) -> None:
    toy.train("undisturbed", *OPTIONS, ranks=2)
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
    assert toy.losses("lost") == toy.losses("undisturbed")
    assert manifests(s3_server.bucket) == ["step_00000009", "step_00000010"]


@pytest.mark.faults
def test_a_store_that_is_down_does_not_stop_training_but_the_end_tells(toy: Any, s3_server: Any) -> None:
    s3_server.stop()
    upload = ["checkpoint.upload_deadline_s=2", f"checkpoint.upload={URL}"]
    here = toy.run_dir("outage")
    plan: dict[str, Any] = {
        "outage": {"overrides": upload},
        "outage ": {"overrides": [here, "schedule.max_steps=4"]},
        "outage  ": {"overrides": [here, *upload]},
    }
    refused, begun, ended = toy.drive(plan, ranks=1).values()
    assert "can't be listed" in refused and "checkpoint.upload=null" in refused
    assert begun == 0
    assert ended.startswith("CheckpointError") and "start the same command again" in ended
    assert [record["step"] for record in toy.records("outage")] == list(range(1, 11))
    report = json.loads((toy.folder / "outage" / "uploads.json").read_text())
    assert report["uploaded"] == [] and "10" in report["failed"]
    s3_server.start()
    assert toy.drive({"outage   ": {"overrides": [here, upload[1]]}}, ranks=1) == {"outage   ": 0}
    assert manifests(s3_server.bucket) == ["step_00000008", "step_00000010"]
