"""Official EViT: scores, kept and dropped tokens, outputs, logits, gradients, at constructed and run-time rates."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close

from pretrain.models.image_vit import Config as ImageConfig
from pretrain.models.image_vit import ImageViT
from pretrain.models.keep_rates import Reorganisation, token_counts
from pretrain.models.weights import load_weights

KINDS = ("evit",)


def build(case) -> ImageViT:
    """The model that meta.json describes, with the case's weights."""
    dims = case.meta["dims"]
    model = ImageViT(
        ImageConfig(
            image_size=dims["img"],
            patch_size=dims["patch"],
            dim=dims["dim"],
            depth=dims["depth"],
            heads=dims["heads"],
            mlp_ratio=dims["mlp"],
            classes=dims["nc"],
            norm_eps=case.meta["layer_norm_eps"],
        )
    ).eval()
    load_weights(model, case.weights)
    rates = case.meta["keep_rate_per_block"]
    rates = rates * dims["depth"] if len(rates) == 1 else rates
    model.reorganise(Reorganisation(fuse=case.meta["fuse_token"]), rates)
    return model


def call_arguments(case) -> dict:
    """Run-time rate or token counts under our names."""
    names = {"keep_rate": "keep_rate", "tokens": "counts"}
    given = {name: value for name, value in case.meta["call_arguments"].items() if name != "get_idx"}
    assert set(given) <= set(names), f"{case.name}: call arguments that this test doesn't know: {given}"
    return {names[name]: value for name, value in given.items() if value is not None}


def run(case):
    """Outputs and gradients under the names of the cases."""
    model, tensors, found = build(case), case.tensors(), {}
    for index, block in enumerate(model.blocks):
        block.norm1.register_forward_pre_hook(
            lambda _module, inputs, index=index: found.__setitem__(f"block{index - 1}.out", inputs[0].detach())
        )
    tokens = model.encode(tensors["x"], **call_arguments(case))
    found |= {f"block{len(model.blocks) - 1}.out": tokens.x.detach()}
    for step in tokens.steps:
        name = f"block{step.block}"
        found |= {f"{name}.cls_attn": step.score, f"{name}.keep_idx": step.kept, f"{name}.compl_idx": step.dropped}
    features = model.pool(tokens)
    logits = model.head(features)
    loss = F.cross_entropy(logits, tensors["label"])
    loss.backward()
    found |= {"features": features.detach(), "logits": logits.detach(), "loss_ce": loss.detach()}
    found |= {f"grad.{name}": value.grad for name, value in model.named_parameters()}
    left = [found[f"block{index}.out"].shape[1] - 1 for index in range(len(model.blocks))]
    return found | {"left_tokens": torch.tensor(left)}


def test_everything_listed(case) -> None:
    tensors, found = case.tensors(), run(case)
    compared = set(tensors) - {"x", "label"}
    assert compared <= set(found), f"not computed: {sorted(compared - set(found))}"
    assert {name for name in found if "idx" in name} == {name for name in tensors if "idx" in name}
    for name in compared:
        exact = not tensors[name].is_floating_point()
        near = {"rtol": 0, "atol": 0} if exact else case.tolerance("outputs")
        assert_close(found[name], tensors[name], **near, msg=lambda text, name=name: f"{name}: {text}")


def test_counts_are_predicted(case) -> None:
    """The counter that costs are computed with agrees, where the constructed rates decide."""
    if case.meta["call_arguments"]:
        rates = call_arguments(case).get("keep_rate")
        if not isinstance(rates, float):
            pytest.skip("token counts are given")
        built = [rates if rate < 1 and rates < 1 else 1 for rate in case.meta["keep_rate_per_block"]]
    else:
        built = case.meta["keep_rate_per_block"]
    tokens = (case.meta["input_size"] // case.meta["dims"]["patch"]) ** 2
    found = token_counts(tokens, built, case.meta["fuse_token"])
    assert found == case.tensors()["left_tokens"].tolist()


def test_checkpointing_changes_nothing(case) -> None:
    tensors, model = case.tensors(), build(case)
    model.activation_checkpointing = True
    F.cross_entropy(model(tensors["x"], **call_arguments(case)), tensors["label"]).backward()
    names = [name for name in tensors if name.startswith("grad.")]
    gradients = dict(model.named_parameters())
    for name in names:
        assert_close(gradients[name.removeprefix("grad.")].grad, tensors[name], **case.tolerance("outputs"))


def test_weights_are_all_used(case) -> None:
    assert set(load_file(case.weights)) == set(build(case).state_dict())
