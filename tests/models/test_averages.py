"""Averages of weights and momentum teachers in one process; with ranks and ZeRO in tests/checkpoint/test_state.py."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pretrain.errors import TrainingError
from pretrain.models import averages
from pretrain.models.averages import MomentumTeacher, WeightAverage, split_averages
from pretrain.runtime.vision_ops import ensure_torchvision


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Sizes that no vector register divides, a frozen part, statistics."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(37, 29), nn.BatchNorm1d(29), nn.GELU(), nn.Linear(29, 3), nn.Linear(3, 3))
    made[4].requires_grad_(False)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.to(dtype)


def train(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name in ("running_mean", "running_var"):
            getattr(model[1], name).add_(0.1 * torch.rand(29, generator=generator))
        model[1].num_batches_tracked += 1


def followed(model: nn.Module) -> dict[str, Tensor]:
    """What there are averages of."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return trained | {name: value for name, value in model.named_buffers() if value.is_floating_point()}


def kept(average: WeightAverage) -> dict[str, Tensor]:
    return {name: getattr(average, key).clone() for key, name in average._names.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.4, 0.9, 0.9999, 1.0])
@pytest.mark.parametrize("chunk", [1, 100, 2**20])
def test_fused_updates_are_those_of_a_loop_bit_for_bit(
    decay: float, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With warm-up, as every average was before it became a choice, by a loop over tensors on the device."""
    monkeypatch.setattr(averages, "CPU_CHUNK", chunk)
    model = network(dtype)
    average = WeightAverage(model, decay, warmup=True)
    loop, updates = kept(average), torch.zeros((), dtype=torch.int64)
    for step in range(30):
        train(model, step)
        average.update(model)
        updates += 1
        keep = ((1 + updates) / (10 + updates)).clamp(max=decay).float()
        for name, value in followed(model).items():
            loop[name].lerp_(value.detach().float(), 1 - keep)
        assert all(torch.equal(value, loop[name]) for name, value in kept(average).items()), step
    assert int(average.updates) == 30 and loop.keys() == kept(average).keys()


def test_the_decay_is_what_was_asked_for_from_the_first_step_on() -> None:
    model = network()
    plain, warm, scheduled = WeightAverage(model, 0.9), WeightAverage(model, 0.9, warmup=True), WeightAverage(model)
    expected = {name: value.double() for name, value in kept(plain).items()}
    for step in range(5):
        train(model, step)
        for average, given in ((plain, None), (warm, None), (scheduled, 0.9)):
            average.update(model, given)
        for name, value in followed(model).items():
            expected[name] = 0.9 * expected[name] + 0.1 * value.detach().double()
    for name, value in kept(plain).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(value, kept(scheduled)[name])
        assert (kept(warm)[name] - value).abs().max() > 0.01, "a warm-up follows faster at first"
    with pytest.raises(ValueError, match="needs one at each update"):
        scheduled.update(model)


def test_a_network_with_statistics_is_averaged_as_timm_does_it() -> None:
    """To the bit, counts included; a table that is not saved with the model is none of it."""
    ensure_torchvision()
    from timm.utils import ModelEmaV3

    model = network()
    model[2].register_buffer("table", torch.zeros(3), persistent=False)
    average, timm = WeightAverage(model, 0.9), ModelEmaV3(model, decay=0.9)
    for step in range(4):
        train(model, step)
        model.train()(torch.randn(8, 37, generator=torch.Generator().manual_seed(step)))
        average.update(model)
        timm.update(model)
    live, batch = copy.deepcopy(model.state_dict()), torch.randn(5, 37)
    with average.applied(model):
        for name, value in timm.module.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        assert torch.equal(model.eval()(batch), timm.module(batch))
    assert (live["1.running_var"] - timm.module[1].running_var).abs().max() > 0.01
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())


def test_float32_in_a_bfloat16_model_and_back_again() -> None:
    model = network(torch.bfloat16)
    average = WeightAverage(model, 0.5)
    average.bfloat16()
    assert {value.dtype for value in kept(average).values()} == {torch.float32}, "small steps would be lost"
    train(model, 1)
    average.update(model)
    live = copy.deepcopy(model.state_dict())
    with average.applied(model):
        for name, value in kept(average).items():
            assert torch.equal(model.state_dict()[name], value.bfloat16())
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())
    again = WeightAverage(network(), 0.5)
    again.load_state_dict(average.state_dict())
    assert int(again.updates) == 1 and all(torch.equal(kept(again)[n], value) for n, value in kept(average).items())
    again.reset(model)
    assert int(again.updates) == 0 and torch.equal(kept(again)["0.weight"], model[0].weight.float())


def test_moving_the_module_leaves_the_count_on_the_host() -> None:
    average = WeightAverage(network(), 0.5).to("meta")
    assert average.updates.device.type == "cpu" and average.get_buffer("0|weight").device.type == "meta"


def test_a_teacher_starts_as_its_model_and_follows_without_gradient() -> None:
    model, twin = network(torch.bfloat16), network(torch.bfloat16)
    train(twin, 9)
    model[1].running_mean.fill_(0.5)
    teacher = MomentumTeacher(model, twin)
    batch = torch.randn(8, 37).bfloat16()
    assert torch.equal(teacher.eval()(batch), model.eval()(batch))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    train(model, 1)
    before = kept(teacher.average)["0.weight"]
    statistics = twin[1].running_mean.clone()
    teacher.update(model, 0.75)
    assert torch.equal(twin[1].running_mean, statistics), "a teacher's statistics are of its own passes"
    expected = 0.75 * before + 0.25 * model[0].weight.float()
    torch.testing.assert_close(kept(teacher.average)["0.weight"], expected)
    assert torch.equal(twin[0].weight, kept(teacher.average)["0.weight"].bfloat16())
    output = teacher(batch.requires_grad_())
    assert not output.requires_grad and not torch.equal(output, model(batch))
    teacher.reset(model)
    assert torch.equal(teacher(batch), model(batch))


def test_a_teacher_moves_by_steps_that_its_format_has_not() -> None:
    """In bfloat16 alone a momentum of 0.999 would round every step away."""
    model = network(torch.bfloat16)
    teacher = MomentumTeacher(model, network(torch.bfloat16))
    start = teacher.twin[0].weight.clone()
    with torch.no_grad():
        model[0].weight += 1
    for _ in range(200):
        teacher.update(model, 0.999)
    moved = (teacher.twin[0].weight - start).float().mean()
    assert moved == pytest.approx(1 - 0.999**200, abs=0.01)


@pytest.mark.parametrize(
    ("place", "other", "said"),
    [
        (4, nn.Linear(3, 1), r"in 2 .*: 4.bias \[3\] -> \[1\], 4.weight \[3, 3\] -> \[1, 3\]; allowed"),
        (4, nn.Identity(), r"4.bias \[3\] -> missing"),
        (2, nn.PReLU(), r"in 1 .*: 2.weight missing -> \[1\]"),
        (1, nn.BatchNorm1d(29, track_running_stats=False), r"1.running_mean \[29\] -> missing"),
    ],
)
def test_a_twin_of_another_shape_is_refused(place: int, other: nn.Module, said: str) -> None:
    """Also in either direction: weights of one row, say, would be broadcast to all."""
    model, twin = network(), network()
    twin[place] = other
    with pytest.raises(TrainingError, match=said):
        MomentumTeacher(model, twin)
    with pytest.raises(TrainingError, match="momentum teacher"):
        MomentumTeacher(twin, model)


def test_averages_of_a_checkpoint_by_the_names_of_the_model() -> None:
    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.center = network(), nn.Parameter(torch.zeros(3))
            self.average = WeightAverage(self.model, 0.9)

    objective = Objective()
    weights, found = split_averages(objective.state_dict())
    assert weights.keys() == objective.model.state_dict().keys()
    assert found.keys() == {"1.running_mean", "1.running_var"} | {
        name for name, value in objective.model.named_parameters() if value.requires_grad
    }
    assert split_averages({"model.a": torch.ones(1), "center": torch.ones(1)}) == ({"a": torch.ones(1)}, {})
