"""Official EViT keep-rate schedule and token counts."""

import re

import torch
from torch.testing import assert_close

from pretrain.models.keep_rates import scheduled_rate, tokens_kept

KINDS = ("evit_schedule",)
NAME = re.compile(r"base(?P<base>[\d.]+)_start(?P<start>\d+)_end(?P<end>\d+)_iters(?P<iters>\d+)")


def test_rates(case) -> None:
    schedules = {name: NAME.fullmatch(name) for name in case.tensors() if name != "token_counts"}
    assert schedules and all(schedules.values()), schedules
    for name, found in schedules.items():
        official, start, iters = case.tensors()[name], int(found["start"]), int(found["iters"])
        rates = [
            scheduled_rate(float(found["base"]), step, iters, start, int(found["end"]) - start)
            for step in range(len(official))
        ]
        assert_close(torch.tensor(rates, dtype=torch.float64), official, rtol=0, atol=1e-12)


def test_counts(case) -> None:
    for tokens, rate, kept in case.tensors().get("token_counts", torch.empty(0, 3)).tolist():
        assert tokens_kept(int(tokens), rate) == kept, (tokens, rate)
