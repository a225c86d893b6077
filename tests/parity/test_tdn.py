"""Official TDN: every tensor of the forward pass, a training step's loss and gradients, and the tables of frames."""

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from pretrain.models.classifier_weights import load_pretrained
from pretrain.models.tdn import TDN, Config
from pretrain.models.tdn_weights import PARTS, PREFIXES

KINDS = ("tdn",)


def build(case: Any) -> TDN:
    sizes = case.meta["dims"]
    config = Config(
        width=sizes["base_width"], blocks=sizes["blocks_per_stage"], classes=sizes["classes"], dropout=0.0,
        window=sizes["frames_per_segment"],
    )  # fmt: skip
    model = TDN(config, sizes["segments"])
    load_pretrained(model, case.weights)
    return model


def clips(case: Any) -> Tensor:
    """Clips [B, T * 5, H, W, 3] of the file's [B, T * 5 * 3, H, W]."""
    return case.tensors()["x"].unflatten(1, (-1, 3)).permute(0, 1, 3, 4, 2)


def watched(model: TDN) -> dict[str, Tensor]:
    """What modules compute in the coming pass, under the names of the files."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, change: Any = lambda value: value) -> None:
        module.register_forward_hook(lambda _m, _i, output: found.__setitem__(name, change(output).detach()))

    def keep_input(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda _m, inputs: found.__setitem__(name, inputs[0].detach()))

    assert model.short_term is not None
    keep_input("avg_diff.out", model.short_term.stem)
    keep("conv1_5.out", model.short_term.stem.bn, F.relu)
    keep("maxpool_diff.out", model.short_term.stem)
    keep("resnext_layer1.out", model.short_term.stage)
    keep("maxpool.out", model.stem)
    for number, stage in enumerate(model.stages, 1):
        keep_input(f"layer{number}_bak.in", stage[0])
        keep(f"layer{number}_bak.out", stage[-1])
        for index, block in enumerate(stage if number > 1 else ()):
            keep_input(f"layer{number}_bak.{index}.mse.in", block.long_term)
            keep(f"layer{number}_bak.{index}.mse.out", block.long_term)
            keep(f"layer{number}_bak.{index}.shift.out", block.temporal)
    keep("new_fc.out", model.head, lambda value: value.flatten(0, 1))
    return found


def test_every_tensor_of_the_forward_pass(case: Any) -> None:
    model, expected = build(case).eval(), case.tensors()
    found = watched(model)
    with torch.no_grad():
        logits = model(clips(case))
    found |= {"logits": logits, "loss_ce": F.cross_entropy(logits, expected["label"])}
    segments, compared = case.meta["dims"]["segments"], 0
    for name, value in expected.items():
        if name in ("x", "label") or "train" in name:
            continue
        plain = name.removesuffix(".first2")
        rows = 2 if plain != name else segments if ".mse." in name or ".shift." in name else None
        assert_close(found[plain][:rows] if found[plain].dim() else found[plain], value, **case.tolerance("outputs"),
                     msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip
        compared += 1
    assert compared > 10


def test_a_training_step(case: Any) -> None:
    model, expected = build(case).train(), case.tensors()
    logits = model(clips(case))
    loss = F.cross_entropy(logits, expected["label"])
    loss.backward()
    near = case.tolerance("gradients")
    assert_close(logits.detach(), expected["logits_train_nodrop"], **near)
    assert_close(loss.detach(), expected["loss_train_nodrop"], **near)
    gradients = {name: value.grad for name, value in model.named_parameters()}
    names = [name for name in expected if name.startswith("grad_train.")]
    assert names and all(value is not None for value in gradients.values()), "no parameter without a gradient"
    for name in names:
        assert_close(gradients[own_name(name.removeprefix("grad_train."))], expected[name], **near)


def own_name(name: str) -> str:
    for old, new in [*PREFIXES.items(), *PARTS.items()]:
        name = name.replace(old, new)
    return name


def test_weights_come_back_under_the_official_names(case: Any) -> None:
    theirs, ours = load_file(case.weights), build(case).to_official()
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        if "conv1_temp" not in name:
            assert_close(ours[name], value, rtol=0, atol=0)


def test_segments_of_other_clips_are_not_mixed(case: Any) -> None:
    model, video = build(case).eval(), clips(case)
    with torch.no_grad():
        assert_close(model(video)[1:], model(video[1:]), rtol=1e-5, atol=1e-5)
