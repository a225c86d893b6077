"""Batch norm over ranks against torch's on the whole batch; ranks are started once for all tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.models.cross_rank_batch_norm import convert_batch_norm
from pretrain.runtime.process_group import Ranks
from pretrain.runtime.vision_ops import ensure_torchvision

ensure_torchvision()
from timm.layers.norm_act import BatchNormAct2d  # noqa: E402

CASES = [
    *("1d", "1d with length", "2d", "3d", "cumulative"),
    *("without weights", "without statistics", "inside", "timm"),
]
Found = dict[tuple[int, int], dict[str, Any]]


@pytest.fixture(scope="module")
def found(in_worlds: Callable[[str], Found]) -> Found:
    return in_worlds("tests.models.batch_norm_program")


@pytest.mark.parametrize("split", ["", " uneven"])
@pytest.mark.parametrize("case", CASES)
def test_as_torch_on_the_whole_batch(found: Found, case: str, split: str) -> None:
    """In float32, in float32 with a channel around 3000 (of which it keeps 1e-4), and in float64."""
    tolerances = {"torch.float32 1": 1e-5, "torch.float32 3000": 5e-3, "torch.float64 1": 1e-12}
    for (world, rank), one in found.items():
        for kind, tolerance in tolerances.items():
            differences = one[f"{case}{split} {kind}"]
            assert differences.keys() >= {"output", "input gradient"}
            assert ("eval" in differences) == (rank == 0)
            assert max(differences.values()) < tolerance, (world, rank, kind, differences)


def test_statistics_of_a_bf16_model_are_float32(found: Found) -> None:
    for (world, rank), one in found.items():
        differences = one["bf16"]
        assert differences["output"] < 0.04, (world, rank)
        if world > 1:
            assert differences["mean"] < 1e-5 and differences["variance"] < 1e-5, differences
            assert differences["eval"] < 0.04, differences


@pytest.mark.parametrize(("norm", "expected"), [
    (nn.BatchNorm2d(3, eps=1e-3, momentum=0.3), "SyncBatchNorm"),
    (BatchNormAct2d(3, act_layer=nn.LeakyReLU, inplace=False), "SyncBatchNormAct"),
])  # fmt: skip
def test_accelerators_get_torchs_own_with_the_same_parameters(norm: nn.Module, expected: str) -> None:
    module = nn.Sequential(norm, nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)).train()
    module(torch.randn(2, 3, 5, 4))  # statistics that are not the first ones
    before, weights = dict(module.state_dict(keep_vars=True)), torch.randn(2, 3, 5, 4)
    said = module.eval()(weights)
    converted = convert_batch_norm(module, Ranks(0, 2, 0, torch.device("cuda")))
    assert [type(part).__name__ for part in converted.children()][::2] == [expected, "SyncBatchNorm"]
    after = converted.state_dict(keep_vars=True)
    assert after.keys() == before.keys() and all(after[name] is value for name, value in before.items())
    torch.testing.assert_close(converted.eval()(weights), said)


def test_refusals_say_what_is_allowed(found: Found) -> None:
    for world in (2, 4):
        for rank in range(world):
            unknown, shape, single = found[world, rank]["refusals"]
            assert "1 is a Own" in unknown and "BatchNorm2d" in unknown
            assert "(2, 4)" in shape and "[B, 3, ...]" in shape
            assert "found 1 values a channel on all ranks" in single
