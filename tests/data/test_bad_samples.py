"""The ledger of unusable samples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.data.bad_samples import BadSample, BadSampleLedger
from pretrain.errors import DataError


def batch(sources: list[int], views: int = 1, bad: list[BadSample] | None = None) -> dict[str, Any]:
    return {
        "source": torch.tensor(sources).repeat_interleave(views),
        "view": torch.arange(views).repeat(len(sources)),
        "bad": bad or [],
    }


def bad(source: str = "a", reason: str = "decode", position: int = 0) -> BadSample:
    return BadSample(source, "00000.tar", "key", 0, position, 0, reason, "detail")


def test_rate_is_counted_per_source_and_decoded_video(tmp_path: Path) -> None:
    ledger = BadSampleLedger(tmp_path, ["a", "b"], rate=0.1, minimum=2)
    ledger.record(batch([1] * 100, views=4, bad=[bad("b"), bad("b")]))
    assert ledger.tried == {"b": 102}, "views of one video count once"
    ledger.record(batch([0] * 15, bad=[bad("a")]))
    with pytest.raises(DataError, match=r"source a: 2 of 17 samples unusable \(11.8%, data.bad_rate allows 10.0%\)"):
        ledger.record(batch([], bad=[bad("a", "open")]))


def test_minimum_comes_before_rate(tmp_path: Path) -> None:
    ledger = BadSampleLedger(tmp_path, ["a"], rate=0.0, minimum=3)
    ledger.record(batch([0], bad=[bad(), bad()]))
    with pytest.raises(DataError, match="most frequent reasons: decode 2, read 1"):
        ledger.record(batch([0], bad=[bad(reason="read")]))


def test_records_are_written_before_the_run_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (BadSampleLedger(tmp_path, ["a"], rate=0.0, minimum=2, rank=rank) for rank in (0, 7))
    first.record(batch([0], bad=[bad(position=1)]))
    with pytest.raises(DataError):
        second.record(batch([0], bad=[bad(position=2), bad(position=3)]))
    lines = [json.loads(line) for line in (tmp_path / "bad_samples" / "rank_00000.jsonl").read_text().splitlines()]
    assert [line["position"] for line in lines] == [1]
    others = (tmp_path / "bad_samples" / "rank_00007.jsonl").read_text().splitlines()
    assert [json.loads(line)["position"] for line in others] == [2, 3]
    assert lines[0] == {
        "source": "a", "shard": "00000.tar", "key": "key", "epoch": 0, "position": 1, "attempt": 0,
        "reason": "decode", "detail": "detail",
    }  # fmt: skip
    assert caplog.text.count("unusable sample replaced") == 2, "the first of each kind and ledger"


def test_state_adds_up() -> None:
    one, other, both = (BadSampleLedger(None, ["a", "b"], rate=0.9, minimum=99) for _ in range(3))
    one.record(batch([0, 1], bad=[bad()]))
    other.record(batch([0], bad=[bad(), bad(reason="read")]))
    for ledger in (one, other):
        both.load(json.loads(json.dumps(ledger.state())))
    assert both.state() == {"tried": {"a": 5, "b": 1}, "bad": {"a": {"decode": 2, "read": 1}}}
    assert both.total == 3
