"""Dropout and stochastic depth by position: each row draws for itself, whatever is computed beside it."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pretrain.models import image_vit
from pretrain.models.classifier import Config, VideoClassifier
from pretrain.models.dropout import _GOLDEN, Dropout, DropPath, _mixed, draw_by_position, keep_mask, with_row_keys
from pretrain.models.recompute import Recompute
from pretrain.models.vit import Block

#: Everything that drops.
DROPS = {"dropout": 0.2, "attention_dropout": 0.2, "drop_path": 0.4, "head_dropout": 0.3}
PLACES = {"epoch": torch.tensor([2] * 4), "position": torch.tensor([8, 8, 9, 9]), "view": torch.tensor([0, 1] * 2)}


def keys() -> Tensor:
    found: Tensor = with_row_keys(5, PLACES)["row_keys"]
    return found


def build(recompute: Recompute = False) -> VideoClassifier:
    torch.manual_seed(0)
    sizes: Any = {"size": "custom", "patch_size": 4, "dim": 24, "depth": 3, "heads": 3, "mlp_ratio": 2.0, "classes": 5}
    model = VideoClassifier(Config(**sizes, **DROPS, positions="rebuild"), 4, 8, 12, recompute)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return model.train()


def gradients(model: VideoClassifier, parts: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs of all four rows in their order, and summed gradients, computed in parts."""
    rows, video = draw_by_position(model), torch.randn(4, 4, 8, 12, 3, generator=torch.Generator().manual_seed(1))
    outputs = torch.zeros(4, 5)
    for number, part in enumerate(parts):
        torch.manual_seed(number)  # what a rank draws by itself must not matter
        rows.keys = keys()[part]
        outputs[part] = model(video[part])
        (outputs[part] ** 2).sum().backward()
        outputs = outputs.detach()
    return outputs, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_rows_drop_the_same_in_any_company(recompute: Recompute) -> None:
    outputs, wanted = gradients(build(), [[0, 1, 2, 3]])
    found, parts = gradients(build(recompute), [[3, 1], [0], [2]])
    assert_close(found, outputs)
    assert wanted.keys() == parts.keys() and len(wanted) > 30
    for name in wanted:
        assert_close(parts[name], wanted[name], rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_a_compiled_model_draws_the_same() -> None:
    model = build()
    rows, video = draw_by_position(model), torch.randn(4, 4, 8, 12, 3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        rows.keys = keys()[order]
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_close(compiled(video), model(video))


def test_a_clip_skips_each_branch_of_a_block_by_itself() -> None:
    """As officially, where DropPath is called twice; one draw for both would skip all of a block or nothing."""
    block, x = Block(6, 2, 12, 1e-6, drop_path=0.5).train(), torch.zeros(4000, 1, 6)
    nn.init.ones_(block.attn.proj.bias)
    nn.init.constant_(block.mlp.fc2.weight, 0.0)
    nn.init.constant_(block.mlp.fc2.bias, 10.0)
    nn.init.constant_(block.attn.proj.weight, 0.0)
    draw_by_position(block).keys = torch.arange(4000) * 7919
    attended, transformed = (block(x)[:, 0, 0] % 20 == 2).float(), (block(x)[:, 0, 0] >= 20).float()
    shares = torch.stack((attended * transformed, attended * (1 - transformed), transformed * (1 - attended))).mean(1)
    assert_close(shares, torch.full((3,), 0.25), rtol=0, atol=0.03)  # four deviations


@pytest.mark.parametrize("kind", ["classifier", "image_vit"])
def test_no_layer_draws_twice_in_one_pass(kind: str) -> None:
    """Its second draw would be the first one again."""
    if kind == "classifier":
        model: nn.Module = build()
        pixels = torch.randn(4, 4, 8, 12, 3)
    else:
        options = image_vit.Config(image_size=8, patch_size=4, dim=24, depth=3, heads=3, classes=5, drop_path=0.4)
        model, pixels = image_vit.ImageViT(options).train(), torch.randn(4, 3, 8, 8)
    calls: Counter[str] = Counter()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Dropout | DropPath)}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    model(pixels)
    assert calls == Counter(layers.keys()) and len(calls) >= 4


def test_half_precision_drops_the_same_elements() -> None:
    layer = Dropout(0.3).train()
    draw_by_position(layer).keys = keys()
    x = torch.full((4, 7, 9), 3.0)
    narrow, wide = layer(x.bfloat16()), layer(x)
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow == 0, wide == 0)
    assert_close(wide.unique(), torch.tensor([0, 3 / 0.7]))
    assert not torch.equal(wide[0] == 0, wide[1] == 0), "views of one clip too"


def test_everything_that_names_a_draw_changes_it() -> None:
    first = keep_mask(keys(), 1, 100_000, 0.3)
    assert_close(first.float().mean(1), torch.full((4,), 0.7), rtol=0, atol=0.006)  # four deviations
    others = [keep_mask(keys(), 2, 100_000, 0.3)]
    others += [keep_mask(with_row_keys(6, PLACES)["row_keys"], 1, 100_000, 0.3)]
    for name in PLACES:
        moved = with_row_keys(5, PLACES | {name: PLACES[name] + 2})["row_keys"]
        others.append(keep_mask(moved, 1, 100_000, 0.3))
    for other in others:
        # Independent draws agree in 0.7^2 + 0.3^2 of all elements.
        assert_close((first == other).float().mean(1), torch.full((4,), 0.58), rtol=0, atol=0.007)
    assert_close(keep_mask(torch.arange(50_000), 1, 1, 0.3).float().mean(), torch.tensor(0.7), rtol=0, atol=0.01)


def test_splitmix64_gives_its_published_numbers() -> None:
    """The first outputs for the seed 1234567, of Vigna's splitmix64.c."""
    found = _mixed(1234567 + torch.arange(1, 4) * _GOLDEN)
    assert [number % 2**64 for number in found.tolist()] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423,
    ]  # fmt: skip


def test_without_an_engine_torch_draws() -> None:
    layers = [Dropout(0.5).train(), DropPath(0.5).train()]
    for layer in layers:
        x = torch.ones(64, 3)
        one, two = (layer(x) for _ in range(2))
        assert not torch.equal(one, two) and set(one.unique().tolist()) == {0.0, 2.0}
        assert torch.equal(copy.deepcopy(layer).eval()(x), x)
    rows = draw_by_position(torch.nn.Sequential(*layers))
    rows.keys = keys()
    assert not torch.equal(layers[0](x), layers[0](x)), "rows that are not those of the batch"
