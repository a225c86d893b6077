"""The first place that is not finite has the right name."""

import torch
from torch import Tensor, nn

from pretrain.guards.first_nonfinite import ROOT, FirstNonFinite, bad_weights, function_without_gradient


class Scaled(nn.Module):
    """Multiplies, by a weight or in its own code."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


class Inner(nn.Module):
    """What it hands to `last` overflows in its own code, not in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.first(x) * 1e38 * 1e38)
        return result


class Root(nn.Module):
    """Square root of a magnitude: its gradient at zero is not finite."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


def probed(module: nn.Module, x: Tensor) -> FirstNonFinite:
    torch.manual_seed(0)
    with FirstNonFinite(module, len(x)) as probe:
        loss = module(x).square().mean()
        if loss.isfinite():
            loss.backward()
    return probe


def test_a_sound_pass_finds_nothing_and_leaves_no_hooks() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    probe = probed(module, torch.randn(3, 4))
    assert probe.finding is None and bad_weights(module) is None
    assert list(probe.activations) == ["0", "1", "2", ROOT]
    expected = module(torch.zeros(1, 4))
    assert probe.activations["2"].largest > 0 and expected.isfinite().all()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_the_module_that_overflows_is_named_with_its_clips() -> None:
    module = nn.Sequential(nn.Identity(), nn.Sequential(Scaled(1e30), Scaled(1e30)), nn.Linear(4, 4))
    x = torch.zeros(3, 4)
    x[1] = 1.0
    finding = probed(module, x).finding
    assert finding is not None
    assert (finding.phase, finding.module, finding.clips) == ("forward", "1.1", (1,))


def test_code_between_modules_is_told_from_the_modules() -> None:
    finding = probed(nn.Sequential(nn.Identity(), Inner()), torch.ones(2, 4)).finding
    assert finding is not None and (finding.phase, finding.module) == ("forward", "1")
    assert "hands to 1.last" in finding.text


def test_a_gradient_that_is_not_finite_is_named_by_module_and_operation() -> None:
    module = nn.Sequential(nn.Linear(4, 4), Root(), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    with torch.no_grad():
        module[0].weight.zero_()
        module[0].bias.zero_()
    finding = probed(module, x).finding
    assert finding is not None and (finding.phase, finding.module) == ("backward", "1")
    function = function_without_gradient(lambda: module(x).mean())
    assert function is not None and "AbsBackward0" in function


def test_weights_come_first() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    with torch.no_grad():
        module[1][0].weight[2, 1] = float("inf")
    finding = bad_weights(module)
    assert finding is not None and (finding.phase, finding.module) == ("weights", "1.0")
    assert "1 of 16" in finding.text
