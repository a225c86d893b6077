"""Official GroupMixFormer: activations, maps and logits of an eval run; loss, gradients and statistics of a step."""

import re

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from pretrain.models.group_mix_attention import HEADS
from pretrain.models.groupmixformer import Config, GroupMixFormer
from pretrain.models.groupmixformer_weights import config_of
from pretrain.models.weights import load_weights

KINDS = ("groupmixformer",)


def build(case) -> GroupMixFormer:
    """The model that meta.json describes, with the case's weights."""
    given = case.meta["config"]
    # What has no option here must be what the model is built with.
    assert (given["num_heads"], given["qk_scale"], given["in_dim"]) == (HEADS, None, 3)
    model = GroupMixFormer(
        Config(
            size="custom",
            dims=given["embedding_dims"],
            depths=given["serial_depths"],
            mlp_ratios=given["mlp_ratios"],
            classes=given["num_classes"],
            drop_path=given["drop_path_rate"],
        )
    )
    load_weights(model, case.weights)
    return model


def first_of(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def watched(model: GroupMixFormer, found: dict[str, Tensor]) -> None:
    """Let modules put what they compute into `found`, under the names of the files."""

    def keep(name: str, module: torch.nn.Module, change=first_of) -> None:
        module.register_forward_hook(lambda _m, _i, output: found.__setitem__(name, change(output).detach()))

    keep("conv_stem", model.conv_stem)
    for index, embedding in enumerate(model.patch_embed_layers):
        keep(f"patch_embed.{index}.out0", embedding, lambda output: output.flatten(2).transpose(1, 2))
    for stage, part in model.groupmixformer_backbone.items():
        for index, block in enumerate(part.gma_stage):
            start = f"stage{stage}.block{index}"
            keep(f"{start}.cpe", block.cpe)
            keep(f"{start}.att", block.att)
            keep(f"{start}.att.crpe", block.att.crpe)
            keep(f"{start}.att.aggregator.out0", block.att.aggregator)
            keep(f"{start}.att.aggregator.out1", block.att.aggregator, lambda output: output[1])
            block.att.aggregator.register_forward_pre_hook(
                lambda _m, inputs, name=start: found.__setitem__(f"{name}.att.aggregator.in", inputs[0].detach())
            )


def evaluated(case) -> dict[str, Tensor]:
    """Everything that the files name of an eval run."""
    model, pixels, found = build(case).eval(), case.tensors()["input"], {}
    watched(model, found)
    with torch.no_grad():
        found |= {f"features.{index}": one for index, one in enumerate(model.forward_maps(pixels))}
        return found | {"logits": model(pixels)}


def trained(case) -> dict[str, Tensor]:
    """Logits, loss, gradients and running statistics of one step in training mode."""
    model, tensors = build(case).train(), case.tensors()
    logits = model(tensors["input"])
    loss = F.cross_entropy(logits, tensors["labels"])
    loss.backward()
    found = {"train.logits": logits.detach(), "train.loss": loss.detach()[None]}
    found |= {f"train.grad.{name}": value.grad for name, value in model.named_parameters()}
    return found | {f"train.buffer.{name}": value for name, value in model.named_buffers()}


def limit(case, name: str, expected: Tensor) -> float:
    """The largest difference that meta.json allows."""
    kind = "gradients" if ".grad." in name else "forward"
    share = re.fullmatch(r"max \|diff\| <= (\S+) \* (max\(1, )?max\|ref\|\)?", case.meta["tolerance"][kind])
    assert share
    largest = float(expected.abs().max())
    return float(share[1]) * (max(1.0, largest) if share[2] else largest)


@pytest.mark.parametrize("run", [evaluated, trained])
def test_everything_listed(case, run) -> None:
    tensors = {name: one for name, one in case.tensors().items() if name not in ("input", "labels")}
    expected = {name: one for name, one in tensors.items() if name.startswith("train.") == (run is trained)}
    found = run(case)
    assert expected and set(expected) <= set(found), f"not computed: {sorted(set(expected) - set(found))}"
    for name, one in expected.items():
        assert found[name].shape == one.shape, name
        assert float((found[name] - one).abs().max()) <= limit(case, name, one), name


def test_sizes_are_read_from_the_weights(case) -> None:
    state, given = load_file(case.weights), case.meta["config"]
    config = config_of(state)
    assert (config.dims, config.depths) == (given["embedding_dims"], given["serial_depths"])
    assert (config.mlp_ratios, config.classes) == (given["mlp_ratios"], given["num_classes"])
    assert set(state) == set(GroupMixFormer(config).state_dict())
