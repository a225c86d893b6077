"""Hidden widths that are filled up on accelerators: the CPU does as one here."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pretrain.models import vit


@pytest.mark.parametrize("activation", [F.gelu, torch.cos], ids=["gelu", "not zero at zero"])
def test_filled_up_widths_change_no_result_and_no_gradient(
    activation: vit.Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    mlp = vit.Mlp(6, 27, activation=activation).double()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases too: zeros would hide an added channel's
    x = torch.randn(2, 5, 6, dtype=torch.float64)

    def outcome() -> list[torch.Tensor]:
        mlp.zero_grad()
        y = mlp(x)
        y.square().sum().backward()
        return [y, *(parameter.grad for parameter in mlp.parameters() if parameter.grad is not None)]

    plain, widths = outcome(), []
    monkeypatch.setattr(vit, "UNALIGNED_DEVICES", ())
    monkeypatch.setattr(mlp, "activation", lambda hidden: widths.append(hidden.shape[-1]) or activation(hidden))
    filled = outcome()
    assert widths == [32]
    assert all(one.shape == other.shape for one, other in zip(plain, filled, strict=True))
    torch.testing.assert_close(filled, plain, rtol=1e-12, atol=1e-12)
    assert {name: list(value.shape) for name, value in mlp.state_dict().items()} == {
        "fc1.weight": [27, 6],
        "fc1.bias": [27],
        "fc2.weight": [6, 27],
        "fc2.bias": [6],
    }


def test_low_rank_updates_see_the_width_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = vit.Mlp(6, 27)
    mlp.fc1.update = nn.Linear(6, 27)
    monkeypatch.setattr(vit, "UNALIGNED_DEVICES", ())
    assert mlp(torch.randn(2, 6)).shape == (2, 6)
