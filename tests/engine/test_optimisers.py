"""Each optimiser takes the steps of a plain loop, alone and under every ZeRO stage; LARS those of its formula."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.checkpoint.partitions import OWN_KEYS
from pretrain.engine.lars import Lars
from pretrain.engine.optimiser import build_optimizer, forget_steps, parameter_groups, set_lr, set_weight_decay
from pretrain.recipe.load import load_recipe
from pretrain.runtime.vision_ops import ensure_torchvision
from tests.engine.optimiser_program import OPTIMISERS, RATES, Model, batch, runs

WEIGHTS = ("first.weight", "second.weight", "late.weight")


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """The decayed tensors and the others, without the product's help."""
    named = dict(model.named_parameters())
    return [
        {"params": [named[name] for name in WEIGHTS]},
        {"params": [value for name, value in named.items() if name not in WEIGHTS], "weight_decay": 0.0},
    ]


#: torch's optimisers over these groups, with the numbers of OPTIMISERS.
PLAIN: dict[str, Any] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3),
    "adam": lambda groups: torch.optim.Adam(groups, betas=(0.5, 0.999), weight_decay=0.3),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.3),
    "nesterov": lambda groups: torch.optim.SGD(groups, momentum=0.8, nesterov=True, weight_decay=0.3),
    "bare": lambda groups: torch.optim.SGD(groups),
}


def plain_steps(name: str) -> dict[str, Tensor]:
    """Weights after the three steps of a loop of torch alone; for LARS, of its formula written out."""
    model = Model()
    named = dict(model.named_parameters())
    optimizer = None if name == "lars" else PLAIN[name](groups_of(model))
    moments = {key: torch.zeros_like(value) for key, value in named.items()}
    for step, lr in enumerate(RATES):
        model.zero_grad()
        model(batch(step)).backward()
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            continue
        for key, value in named.items():
            moments[key] = 0.9 * moments[key] + lars_gradient(value, 0.3, 0.02)
            value.data -= lr * moments[key]
    return {key: value.detach() for key, value in named.items()}


def lars_gradient(value: Tensor, weight_decay: float, trust: float) -> Tensor:
    """SNCLR's specification, section 4: tensors of one dimension get neither weight decay nor trust scaling."""
    gradient = value.grad
    assert gradient is not None
    if value.ndim < 2:
        return gradient
    gradient = gradient + weight_decay * value.detach()
    size, slope = float(value.detach().norm()), float(gradient.norm())
    return gradient * (trust * size / slope if size > 0 and slope > 0 else 1.0)


@pytest.fixture(scope="module")
def by_deepspeed(in_engines: Callable[[str], dict[tuple[int, int], Any]]) -> list[dict[str, dict[str, Tensor]]]:
    """Weights on each of two ranks."""
    return list(in_engines("tests.engine.optimiser_program").values())


@pytest.mark.parametrize(("name", "stage", "dtype"), runs())
def test_deepspeed_takes_the_steps_of_a_plain_loop(by_deepspeed: Any, name: str, stage: int, dtype: str) -> None:
    expected = plain_steps(name)
    # bf16 weights carry 8 bits, and a gradient of theirs as many.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == "fp32" else {"rtol": 0.02, "atol": 0.02}
    for one in by_deepspeed:
        found = one[f"{name} {stage} {dtype}"]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", OPTIMISERS)
def test_built_optimiser_takes_the_steps_of_a_plain_loop(name: str) -> None:
    model = Model()
    optimizer = build_optimizer(load_recipe("demo", OPTIMISERS[name].split()), model, torch.device("cpu"))
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}, "nothing moves before the first step sets it"
    for step, lr in enumerate(RATES):
        model.zero_grad()
        model(batch(step)).backward()
        set_lr(optimizer, lr)
        optimizer.step()
    for key, value in plain_steps(name).items():
        torch.testing.assert_close(dict(model.named_parameters())[key].detach(), value, rtol=1e-6, atol=1e-7)


def test_entries_of_groups_that_are_no_options_are_known_to_checkpoints() -> None:
    (group, *_) = parameter_groups(Model(), 0.05)
    assert group.keys() == {"params", "weight_decay"} | OWN_KEYS


def test_lars_without_decay_still_adapts() -> None:
    """timm's Lars would take plain steps here, of another size by orders of magnitude."""
    weight = nn.Parameter(torch.full((3, 4), 2.0))
    optimizer = Lars([{"params": [weight]}], lr=0.5, momentum=0.0, weight_decay=0.0, trust=0.01)
    weight.grad = torch.full((3, 4), 100.0)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3, 4), 2.0 - 0.5 * 0.01 * 2.0))


def test_lars_is_timms_where_gradient_and_weight_point_the_same_way() -> None:
    """Only there is |g + wd p| = |g| + wd |p|, which timm divides by."""
    ensure_torchvision()
    from timm.optim.lars import Lars as TimmLars

    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    own = Lars([{"params": [ours]}], lr=0.3, momentum=0.9, weight_decay=0.2, trust=0.1)
    timm = TimmLars([theirs], lr=0.3, momentum=0.9, weight_decay=0.2, trust_coeff=0.1, eps=0.0)
    for _ in range(3):
        for parameter, optimizer in ((ours, own), (theirs, timm)):
            parameter.grad = parameter.detach() * 1.7
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
    for parameter, optimizer in ((ours, own), (theirs, timm)):
        parameter.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
        optimizer.step()
    assert not torch.allclose(ours, theirs, rtol=1e-3)


def test_lars_leaves_alone_what_has_no_gradient() -> None:
    model = Model()
    optimizer = build_optimizer(load_recipe("demo", OPTIMISERS["lars"].split()), model, torch.device("cpu"))
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    model.first.weight.grad, given = torch.ones_like(model.first.weight), torch.ones_like(model.first.weight)
    set_lr(optimizer, 0.1)
    optimizer.step()
    changed = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
    assert changed == ["first.weight"] == [key for key, value in model.named_parameters() if optimizer.state.get(value)]
    assert torch.equal(model.first.weight.grad, given), "the gradient is as it was"


def test_forgotten_steps_leave_no_moment() -> None:
    """DeepSpeed's idle step with zero gradients puts the decay of Adam, SGD and LARS into their moments."""
    for name, words in OPTIMISERS.items():
        model = Model()
        optimizer = build_optimizer(load_recipe("demo", words.split()), model, torch.device("cpu"))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        if name in ("adam", "sgd", "nesterov", "lars"):
            assert any(value.abs().sum() > 0 for value in _moments(optimizer)), name
        forget_steps(optimizer)
        for step, lr in enumerate(RATES):
            model.zero_grad()
            model(batch(step)).backward()
            set_lr(optimizer, lr)
            optimizer.step()
        for key, value in plain_steps(name).items():
            torch.testing.assert_close(dict(model.named_parameters())[key].detach(), value, rtol=1e-6, atol=1e-7)


def _moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]


def test_weight_decay_is_set_where_there_is_some() -> None:
    optimizer = torch.optim.AdamW(parameter_groups(Model(), 0.05))  # type: ignore[arg-type]
    set_weight_decay(optimizer, 0.2)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
