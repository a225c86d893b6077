import pytest
import torch
from torch import nn

from pretrain.data.samples import Samples
from pretrain.engine.build import count_model, move_buffers
from pretrain.engine.deepspeed_config import deepspeed_config
from pretrain.engine.optimiser import forget_steps, parameter_groups
from pretrain.errors import RecipeError
from pretrain.models.base import Cost
from pretrain.models.pixels import PixelNormalization
from pretrain.models.positions import SinCosPositions
from pretrain.objectives.base import Method, Objective, decays
from pretrain.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("encoder.blocks.0.attn.qkv.weight", (96, 32), True),
        ("encoder.patch_embed.proj.weight", (32, 3, 2, 16, 16), True),
        ("encoder.blocks.0.attn.q_bias", (32,), False),
        ("encoder.blocks.0.norm1.weight", (32,), False),
        ("encoder.blocks.0.attn.scale", (2, 1, 1), False),
        ("decoder.head.bias", (8, 8), False),
        ("mask_token", (1, 1, 32), False),
        ("model.mask_token", (1, 1, 32), False),
        ("model.pos_embed", (1, 8, 32), False),
        ("cls_token", (1, 1, 32), False),
        ("_orig_mod.mask_token", (1, 1, 32), False),
        ("_orig_mod.model._orig_mod.mask_token", (1, 1, 32), False),
        ("model.rescale", (4, 4), True),
    ],
)
def test_which_tensors_decay(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert decays(name, shape) is expected


class Small(Objective):
    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.layer = nn.Linear(4, 4)
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.mask_token


def test_groups_of_a_compiled_module_are_those_of_the_plain_one() -> None:
    plain = Small()
    compiled = torch.compile(plain)
    assert any("_orig_mod." in name for name, _ in compiled.named_parameters())

    def members(module: nn.Module) -> list[list[int]]:
        return [[id(parameter) for parameter in group["params"]] for group in parameter_groups(module, 0.05)]

    assert (
        members(compiled) == members(plain) == [[id(plain.layer.weight)], [id(plain.mask_token), id(plain.layer.bias)]]
    )
    assert [group["weight_decay"] for group in parameter_groups(plain, 0.05)] == [0.05, 0.0]


def test_shape_of_a_sharded_parameter_is_its_whole_one() -> None:
    objective = Small()
    weight = objective.layer.weight
    weight.ds_shape = torch.Size((4, 4))
    weight.ds_numel = 16
    weight.data = torch.empty(0)
    assert [len(group["params"]) for group in parameter_groups(objective, 0.05)] == [1, 2]


def test_forgotten_steps_restore_the_first_bias_correction() -> None:
    def first_update(idle_step: bool) -> torch.Tensor:
        weight = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=0.0, weight_decay=0.1)
        if idle_step:
            weight.grad = torch.zeros(3)
            optimizer.step()
            forget_steps(optimizer)
        optimizer.param_groups[0]["lr"] = 0.1
        weight.grad = torch.tensor([1.0, -2.0, 3.0])
        optimizer.step()
        return weight.detach()

    assert torch.equal(first_update(idle_step=True), first_update(idle_step=False))


def test_forgotten_steps_leave_sgd_without_momentum() -> None:
    def two_updates(idle_step: bool) -> torch.Tensor:
        weight = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.0, momentum=0.9, weight_decay=0.5)
        if idle_step:
            weight.grad = torch.zeros(3)
            optimizer.step()
            forget_steps(optimizer)
        optimizer.param_groups[0]["lr"] = 0.1
        for _ in range(2):
            weight.grad = torch.tensor([1.0, -2.0, 3.0])
            optimizer.step()
        return weight.detach()

    assert torch.equal(two_updates(idle_step=True), two_updates(idle_step=False))


@pytest.mark.parametrize("parameters", [7, 8, 10**9 + 1])
def test_buckets_are_even_whatever_the_size_of_the_model(parameters: int) -> None:
    """ZeRO 1 and 2 assert it; a head of 27 classes makes a model odd."""
    section = deepspeed_config(load_recipe("demo"), 1, parameters, True)["zero_optimization"]
    assert section["allgather_bucket_size"] % 2 == section["reduce_bucket_size"] % 2 == 0


@pytest.mark.parametrize(("parameters", "bucket"), [(10**6, 10**6), (10**8, 25 * 2**19), (10**9, 100 * 2**20)])
def test_buckets_leave_something_to_overlap(parameters: int, bucket: int) -> None:
    """Within one bucket all gradients would be sent when the backward pass is over."""
    section = deepspeed_config(load_recipe("vit_b_dual"), 1, parameters, False)["zero_optimization"]
    assert section["reduce_bucket_size"] == section["allgather_bucket_size"] == bucket


def test_gradients_cross_many_ranks_in_float32() -> None:
    def crossing(ranks: int, *more: str) -> object:
        words = [f"batch.samples={32 * ranks}", "batch.micro=32", "compute.dtype=bf16", *more]
        return deepspeed_config(load_recipe("vit_b_dual", words), 1, 10**8, False)["communication_data_type"]

    assert [crossing(64), crossing(128)] == ["bf16", "fp32"]
    assert crossing(128, "zero.communication_dtype=bf16") == "bf16"
    assert crossing(8, "zero.communication_dtype=fp32") == "fp32"


def test_buffers_follow_the_weights_to_the_device() -> None:
    """Under deepspeed.zero.Init what NumPy made stays on the CPU; the meta device stands for an accelerator here."""
    with torch.device("meta"):
        model = nn.ModuleList([PixelNormalization(), SinCosPositions(12, 8), nn.BatchNorm1d(3)])
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu", "meta"}
    kept = model[2].running_mean
    move_buffers(model, torch.device("meta"))
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert model[2].running_mean is kept, "others hold it too, averages for example"


class Tempered(Objective):
    """A network with a temperature that has no dimensions, as CLIP's has elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(2, 2)
        self.temperature = nn.Parameter(torch.tensor(0.7))


class TemperedMethod(Method):
    def samples(self) -> Samples:
        raise NotImplementedError

    def cost(self) -> Cost:
        raise NotImplementedError

    def build(self) -> Objective:
        return Tempered()


def test_a_parameter_without_dimensions_is_refused_before_anything_is_built() -> None:
    with pytest.raises(RecipeError, match=r"Tempered: temperature has no dimensions.*allowed: shape \[1\]"):
        count_model(TemperedMethod(load_recipe("vit_b_dual")))
