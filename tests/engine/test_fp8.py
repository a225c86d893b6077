"""compute.fp8: which layers get another product, and where it is refused; torchao is a stand-in."""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.engine.compiled_parts import compile_parts
from pretrain.engine.fp8 import check_fp8, multiply_in_fp8
from pretrain.errors import RecipeError
from pretrain.objectives.base import method_of
from pretrain.recipe.load import load_recipe

#: Two blocks of aligned widths; the decoder's are 24, no multiple of 16.
SIZES = ("model.dim=32", "model.depth=2", "model.heads=2", "model.decoder_dim=24", "model.decoder_heads=2",
         "model.decoder_depth=1")  # fmt: skip
ENCODER = [f"model.encoder.blocks.{block}.{layer}" for block in (0, 1)
           for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]  # fmt: skip


@dataclass
class Config:
    """What torchao would be asked for."""

    name: str
    emulate: bool = False
    pad_inner_dim: bool = False

    @staticmethod
    def from_recipe_name(name: str) -> "Config":
        return Config(name)


class Coarse(nn.Linear):
    """A layer that rounds its weight to eighths."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.device == self.weight.device
        return F.linear(x, (self.weight * 8).round() / 8)


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """A torchao; the configurations that it was asked for."""
    asked: list[Config] = []

    def convert(module: nn.Sequential, config: Config) -> nn.Sequential:
        asked.append(config)
        return nn.Sequential(Coarse(16, 16, bias=False, device="meta"))

    package, float8 = ModuleType("torchao"), ModuleType("torchao.float8")
    for name, value in {"Float8LinearConfig": Config, "convert_to_float8_training": convert}.items():
        setattr(float8, name, value)
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.float8", float8)
    return asked


def built(*overrides: str) -> tuple[Any, dict[str, Any]]:
    method = method_of(load_recipe("demo", [*SIZES, *overrides]))
    torch.manual_seed(0)
    return method.build(), dict(method.example(2))


def test_aligned_trained_layers_of_blocks_multiply_otherwise(torchao: list[Config]) -> None:
    objective, _ = built()
    objective.model.encoder.blocks[0].attn.proj.weight.requires_grad_(False)
    names = list(objective.state_dict())
    assert multiply_in_fp8(objective, "rowwise") == [name for name in ENCODER if name != ENCODER[1]]
    assert torchao == [Config("rowwise", pad_inner_dim=True)]
    assert list(objective.state_dict()) == names, "its layer is no part of the model"
    heads = [part for name, part in objective.named_modules() if isinstance(part, nn.Linear) and "blocks" not in name]
    assert heads and all(getattr(head, "product", None) is None for head in heads)


def test_widths_are_those_that_an_accelerator_fills_up(torchao: list[Config]) -> None:
    objective, _ = built("model.decoder_dim=32", "model.mlp_ratio=1.1")
    found = multiply_in_fp8(objective, "rowwise")
    assert "model.decoder.blocks.0.mlp.fc1" in found and objective.model.decoder.blocks[0].mlp.fc1.out_features == 35


def test_the_product_gets_the_layers_weight_and_bias_and_compiles_whole(torchao: list[Config]) -> None:
    objective, batch = built()
    for value in objective.parameters():
        nn.init.normal_(value, std=0.3)
    plain = objective(batch).loss.item()
    multiply_in_fp8(objective, "tensorwise")
    loss = objective(batch).loss
    assert loss.item() != plain
    for name, value in objective.named_parameters():
        if name.removesuffix(".weight") in ENCODER:
            value.data = (value.data * 8).round() / 8
    for part in objective.modules():
        part.__dict__.pop("product", None)
    torch.testing.assert_close(objective(batch).loss, loss)
    multiply_in_fp8(objective, "tensorwise")
    graphs = []
    compile_parts(objective, lambda graph, inputs: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(objective(batch).loss, loss)
    torch._dynamo.reset()
    assert len(graphs) == 4, "encoder's block, decoder's, pixels in, loss: the product breaks none of them"


def test_none_changes_nothing() -> None:
    objective, _ = built()
    check_fp8("none", torch.device("cpu"))
    assert multiply_in_fp8(objective, "none") == []
    assert all(getattr(part, "product", None) is None for part in objective.modules())


def test_a_model_without_such_layers_is_refused(torchao: list[Config]) -> None:
    objective, _ = built("model.dim=24")
    with pytest.raises(RecipeError, match=r"fp8: found rowwise, and the model has no blocks .* multiples of 16"):
        multiply_in_fp8(objective, "rowwise")


def test_devices_that_cannot_are_refused(monkeypatch: pytest.MonkeyPatch, torchao: list[Config]) -> None:
    with pytest.raises(RecipeError, match=r"found rowwise on cpu \(no GPU\), allowed: 8\.9 or more, or none"):
        check_fp8("rowwise", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(RecipeError, match=r"on cuda:1 \(compute capability 8\.0\), allowed: 8\.9"):
        check_fp8("tensorwise", torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_fp8("tensorwise", torch.device("cuda:1"))


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(RecipeError, match=r"rowwise needs torchao, .*pip install 'tubelet\[fp8\]', or set"):
        check_fp8("rowwise", torch.device("cuda:0"))
