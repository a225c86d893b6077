"""The ledger of unusable samples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.data.bad_samples import BadSample, BadSampleLedger


def batch(sources: list[int], views: int = 1, bad: list[BadSample] | None = None) -> dict[str, Any]:
    return {
        "source": torch.tensor(sources).repeat_interleave(views),
        "view": torch.arange(views).repeat(len(sources)),
        "bad": bad or [],
    }


def bad(source: str = "a", reason: str = "decode", position: int = 0) -> BadSample:
    return BadSample(source, "00000.tar", "key", 0, position, 0, reason, "detail")


def verdict(*ledgers: BadSampleLedger) -> str | None:
    """What all ranks say together."""
    numbers = [sum(column) for column in zip(*(ledger.numbers() for ledger in ledgers), strict=True)]
    errors = {str(error) for ledger in ledgers if (error := ledger.judge(numbers))}
    return errors.pop() if errors else None


def test_rate_is_counted_per_source_and_decoded_video(tmp_path: Path) -> None:
    ledger = BadSampleLedger(tmp_path, ["a", "b"], rate=0.1, minimum=2)
    ledger.record(batch([1] * 100, views=4, bad=[bad("b"), bad("b")]))
    assert ledger.tried == {"b": 102}, "views of one video count once"
    assert verdict(ledger) is None
    ledger.record(batch([0] * 15, bad=[bad("a")]))
    assert verdict(ledger) is None
    ledger.record(batch([], bad=[bad("a", "open")]))
    found = verdict(ledger)
    assert found and found.startswith("source a: 2 of 17 samples unusable on all ranks (11.8%, data.bad_rate allows 10")


def test_minimum_comes_before_rate(tmp_path: Path) -> None:
    ledger = BadSampleLedger(tmp_path, ["a"], rate=0.0, minimum=3)
    ledger.record(batch([0], bad=[bad(), bad()]))
    assert verdict(ledger) is None
    ledger.record(batch([0], bad=[bad(reason="read")]))
    assert "most frequent reasons on this rank: decode 2, read 1" in (verdict(ledger) or "")


def test_the_rate_is_that_of_all_ranks() -> None:
    ranks = [BadSampleLedger(None, ["a", "b"], rate=0.1, minimum=3) for _ in range(4)]
    for number, ledger in enumerate(ranks):
        ledger.record(batch([0] * 10, bad=[bad()] * (3 if number == 2 else 0)))
    assert verdict(*ranks) is None, "3 of 43, though 3 of 13 on one rank"
    for ledger in ranks[:2]:
        ledger.record(batch([], bad=[bad(), bad()]))
    assert "7 of 47 samples" in (verdict(*ranks) or ""), "no rank has more than 3"
    for ledger in ranks:
        ledger.record(batch([0]))
    assert verdict(*ranks) is None, "only a new unusable sample is judged: a run that goes on must get somewhere"


def test_reset_takes_a_step_back() -> None:
    ledger = BadSampleLedger(None, ["a"], rate=0.1, minimum=3)
    ledger.record(batch([0, 0], bad=[bad()]))
    before = ledger.state()
    ledger.record(batch([0], bad=[bad(reason="open")]))
    ledger.reset(before)
    assert ledger.state() == before == {"tried": {"a": 3}, "bad": {"a": {"decode": 1}}}


def test_records_of_every_ledger_are_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (BadSampleLedger(tmp_path, ["a"], rate=0.0, minimum=2, rank=rank) for rank in (0, 7))
    first.record(batch([0], bad=[bad(position=1)]))
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
