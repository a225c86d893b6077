"""CLIP towers: equal to open_clip's and transformers' on their own files, loaded strictly, open to what others add."""

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from pretrain.errors import RecipeError, WeightsError
from pretrain.models.clip import CLIP, Config, TextTower, VisualTower, check, cost, quick_gelu, resolve
from pretrain.models.clip_weights import load_clip, open_clip_names, our_names
from pretrain.models.cubes import Grid
from pretrain.models.positions import stretch_class_table
from pretrain.models.vit import Block
from pretrain.runtime.vision_ops import ensure_torchvision

#: Heads are no 64 channels wide, as in H/14; the images have 3 x 3 patches and the towers different sizes.
SIZES: dict[str, Any] = {
    "size": "custom", "image_size": 24, "patch_size": 8, "dim": 48, "depth": 3, "heads": 3, "embedding": 20,
    "text_dim": 32, "text_depth": 2, "text_heads": 4, "context": 10, "vocabulary": 50,
}  # fmt: skip
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def as_trained(model: nn.Module) -> Any:
    """Values as training leaves them: no bias is zero, no norm one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            drawn = torch.randn(value.shape, generator=generator)
            norm = "ln_" in name or "norm" in name or "layrnorm" in name
            value.copy_(
                1 + 0.3 * drawn if norm and name.endswith("weight") else drawn * (0.2 if value.dim() > 1 else 0.4)
            )
    return model.eval()


def theirs(activation: str, custom: bool = False) -> Any:
    """The model of open_clip."""
    ensure_torchvision()
    import open_clip

    c = SIZES
    vision = {"image_size": c["image_size"], "layers": c["depth"], "width": c["dim"], "patch_size": c["patch_size"],
              "head_width": c["dim"] // c["heads"]}  # fmt: skip
    text = {"context_length": c["context"], "vocab_size": c["vocabulary"], "width": c["text_dim"],
            "heads": c["text_heads"], "layers": c["text_depth"]}  # fmt: skip
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return as_trained(kind(c["embedding"], vision, text, quick_gelu=activation == "quick_gelu"))


def hugging_face(activation: str, eos: int = 49) -> Any:
    """The model of transformers."""
    import transformers

    c, same = SIZES, {"hidden_act": activation, "projection_dim": SIZES["embedding"]}
    vision = {"hidden_size": c["dim"], "intermediate_size": 4 * c["dim"], "num_hidden_layers": c["depth"],
              "num_attention_heads": c["heads"], "image_size": c["image_size"],
              "patch_size": c["patch_size"]}  # fmt: skip
    text = {"hidden_size": c["text_dim"], "intermediate_size": 4 * c["text_dim"], "num_hidden_layers": c["text_depth"],
            "num_attention_heads": c["text_heads"], "max_position_embeddings": c["context"],
            "vocab_size": c["vocabulary"], "eos_token_id": eos, "bos_token_id": 48, "pad_token_id": 49}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text | same, vision_config=vision | same, projection_dim=SIZES["embedding"]
    )
    return as_trained(transformers.CLIPModel(config))


def ours(activation: str | None, **other: Any) -> CLIP:
    return CLIP(Config(**{**SIZES, "activation": activation, **other})).eval()


def inputs() -> tuple[Tensor, Tensor]:
    """Images, and texts: empty, short, padded with the end again (ties of the highest id), as long as the context."""
    images = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    ids = torch.zeros(5, 10, dtype=torch.int64)
    ids[0, :2] = torch.tensor([48, 49])
    ids[1, :5] = torch.tensor([48, 7, 7, 31, 49])
    ids[2] = torch.tensor([48, 3, 49, 49, 49, 49, 49, 49, 49, 49])
    ids[3] = torch.tensor([48, 1, 2, 3, 4, 5, 6, 7, 8, 49])
    ids[4, :3] = torch.tensor([48, 47, 49])
    return images, ids


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equal_to_open_clip(activation: str, tmp_path: Path) -> None:
    reference, model, (images, ids) = theirs(activation), ours(activation), inputs()
    torch.save(reference.state_dict(), tmp_path / "clip.pt")
    report = load_clip(model, str(tmp_path / "clip.pt"))
    assert report.layout == "open_clip" and len(report.matched) == len(reference.state_dict())
    with torch.no_grad():
        found = model(images, ids)
        torch.testing.assert_close(found.images, reference.encode_image(images), **CLOSE)
        torch.testing.assert_close(found.texts, reference.encode_text(ids), **CLOSE)
        torch.testing.assert_close(found.scale, reference.logit_scale.exp())
        features = model.visual.forward_features(images, layers=(0, -1))
        middle = reference.visual.transformer.forward_intermediates(reference.visual._embeds(images))[1]
        torch.testing.assert_close(features.layers[0], middle[0], **CLOSE)
        assert torch.equal(features.layers[1], features.tokens)
        reference.visual.output_tokens = True
        torch.testing.assert_close(model.visual.norm(features.tokens)[:, 1:], reference.visual(images)[1], **CLOSE)
        all_tokens = reference.visual.ln_post(reference.visual.transformer(reference.visual._embeds(images)))
        projected = all_tokens @ reference.visual.proj
        torch.testing.assert_close(model.visual.forward_head(features.tokens, pooled=False), projected, **CLOSE)
        text = reference.token_embedding(ids) + reference.positional_embedding
        text = reference.ln_final(reference.transformer(text, attn_mask=reference.attn_mask))
        tokens = model.text.forward_features(ids).tokens
        torch.testing.assert_close(model.text.forward_head(tokens), text @ reference.text_projection, **CLOSE)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equal_to_transformers(activation: str, tmp_path: Path) -> None:
    """The folder as `save_pretrained` writes it says which activation it is."""
    reference, (images, ids) = hugging_face(activation), inputs()
    reference.save_pretrained(tmp_path)
    model = ours(activation)
    report = load_clip(model, str(tmp_path))
    assert report.layout == "Hugging Face" and not report.missing and not report.unexpected
    with torch.no_grad():
        output = reference(input_ids=ids, pixel_values=images, output_hidden_states=True)
        seen, read = output.vision_model_output, output.text_model_output
        found = model(images, ids)
        unit = [value / value.norm(dim=-1, keepdim=True) for value in (found.images, found.texts)]
        torch.testing.assert_close(unit[0], output.image_embeds, **CLOSE)
        torch.testing.assert_close(unit[1], output.text_embeds, **CLOSE)
        torch.testing.assert_close(found.scale * unit[0] @ unit[1].t(), output.logits_per_image, rtol=1e-4, atol=1e-4)
        features = model.visual.forward_features(images, range(3))
        torch.testing.assert_close(features.tokens, seen.last_hidden_state, **CLOSE)
        for ours_, theirs_ in zip(features.layers, seen.hidden_states[1:], strict=True):
            torch.testing.assert_close(ours_, theirs_, **CLOSE)
        read_tokens = model.text.norm(model.text.forward_features(ids).tokens)
        torch.testing.assert_close(read_tokens, read.last_hidden_state, **CLOSE)


@pytest.mark.parametrize(("eos", "other"), [(2, {}), (30, {"end_id": 30})])
def test_end_of_text_of_old_and_extended_files(eos: int, other: dict[str, int], tmp_path: Path) -> None:
    """Files of before 2023 say 2 and mean the highest id; a vocabulary may go on behind the end."""
    reference, model = hugging_face("gelu", eos), ours("gelu", **other)
    reference.save_pretrained(tmp_path)
    load_clip(model, str(tmp_path))
    ids = inputs()[1] if eos == 2 else torch.tensor([[48, 30, 49, 30], [1, 49, 2, 30]])
    with torch.no_grad():
        expected = reference.get_text_features(input_ids=ids)
        expected = getattr(expected, "pooler_output", expected)
        torch.testing.assert_close(model.text(ids), expected, **CLOSE)


def test_open_clip_reads_what_we_write() -> None:
    reference, model, (images, ids) = theirs("gelu"), as_trained(ours("gelu")), inputs()
    reference.load_state_dict(open_clip_names(model.state_dict()), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(reference.encode_image(images), model.visual(images), **CLOSE)
        torch.testing.assert_close(reference.encode_text(ids), model.text(ids), **CLOSE)
    for strange in ("visual.blocks.0.adaptmlp.down.weight", "visual.time.table"):
        with pytest.raises(WeightsError, match=strange):
            open_clip_names({strange: torch.ones(2, 2)})


def test_same_gradients_as_open_clip() -> None:
    reference, model, (images, ids) = theirs("quick_gelu"), ours("quick_gelu"), inputs()
    load_clip(model, "memory", raw=reference.state_dict())
    found = model(images, ids)
    (found.scale * found.images @ found.texts.t()).square().mean().backward()
    expected = reference.logit_scale.exp() * reference.encode_image(images) @ reference.encode_text(ids).t()
    expected.square().mean().backward()
    gradients = our_names({name: value.grad for name, value in reference.named_parameters()})
    for name, value in model.named_parameters():
        assert value.grad is not None
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(value.grad, gradients[name], rtol=1e-3, atol=1e-4 * scale, msg=name)


class Archive(nn.Module):
    """What OpenAI traced: the model with three numbers beside its weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, value in model.named_parameters(recurse=False):
            self.register_parameter(name, value)  # type: ignore[arg-type]
        for name, number in (("input_resolution", 24), ("context_length", 10), ("vocab_size", 50)):
            self.register_buffer(name, torch.tensor(number))

    def forward(self, images: Tensor) -> Tensor:
        return self.visual(images)  # type: ignore[no-any-return, operator]


def openai_archive(path: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Archive(theirs("quick_gelu")).half(), inputs()[0].half(), check_trace=False)
        torch.jit.save(traced, path)
        return dict(torch.jit.load(path).state_dict())


def test_openai_archive(tmp_path: Path) -> None:
    """Read as tensors, equal to what torch.jit.load makes of it, and without any activation being named."""
    state = openai_archive(tmp_path / "ViT-B-32.pt")
    model = ours("quick_gelu")
    model.config.activation = None
    model.config.size = "B/32"  # whose activation is quick_gelu
    for config in (model.visual.config, model.text.config):
        assert config is model.config
    report = load_clip(model, str(tmp_path / "ViT-B-32.pt"))
    assert report.layout == "OpenAI" and not report.unexpected and not report.missing
    expected = our_names(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name].float()), name
    with pytest.raises(WeightsError, match="OpenAI's layout says activation=quick_gelu, the model has gelu"):
        load_clip(ours("gelu"), str(tmp_path / "ViT-B-32.pt"))


def test_code_of_an_archive_is_never_run(tmp_path: Path) -> None:
    class Command:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'run'}",)

    path = tmp_path / "evil.pt"
    for content in (pickle.dumps(Command(), 2), b"", b"\x80\x02.", pickle.dumps({"a": 1}, 2)):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("evil/constants.pkl", b"")
            archive.writestr("evil/data.pkl", content)
        with pytest.raises(WeightsError, match="TorchScript"):
            load_clip(ours("gelu"), str(path))
    assert not (tmp_path / "run").exists()
    openai_archive(path)
    whole = zipfile.ZipFile(path)
    cut = io.BytesIO()
    with zipfile.ZipFile(cut, "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name)[: 10 if "/data/" in name else None])
    path.write_bytes(cut.getvalue())
    with pytest.raises(WeightsError, match="can't be read as tensors"):
        load_clip(ours("gelu"), str(path))


def test_other_places_and_wrappers(tmp_path: Path) -> None:
    """A training checkpoint of open_clip, its hub folder, its models with a custom text tower, and our own file."""
    reference, config = theirs("gelu"), {"quick_gelu": False, "vision_cfg": {"width": 48, "head_width": 16}}
    state = reference.state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "a.pt")
    hub = tmp_path / "hub"
    hub.mkdir()
    safetensors.torch.save_file(state, hub / "open_clip_model.safetensors")
    (hub / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save(theirs("gelu", custom=True).state_dict(), tmp_path / "custom.pt")
    first = ours("gelu")
    load_clip(first, str(tmp_path / "a.pt"))
    torch.save(first.state_dict(), tmp_path / "own.pt")
    for place in ("hub", "hub/open_clip_model.safetensors", "own.pt"):
        model = ours("gelu")
        load_clip(model, str(tmp_path / place))
        assert all(torch.equal(value, first.state_dict()[name]) for name, value in model.state_dict().items()), place
    report = load_clip(ours("gelu"), str(tmp_path / "custom.pt"))
    assert len(report.matched) == len(state)


def test_one_tower_takes_its_part(tmp_path: Path) -> None:
    reference, (images, ids) = theirs("gelu"), inputs()
    torch.save(reference.state_dict(), tmp_path / "clip.pt")
    config = Config(**SIZES, activation="gelu")
    for tower, given, expected in (
        (VisualTower(config).eval(), images, reference.encode_image(images)),
        (TextTower(config).eval(), ids, reference.encode_text(ids)),
    ):
        report = load_clip(tower, str(tmp_path / "clip.pt"))
        assert not report.missing and "logit_scale" in report.unexpected
        torch.testing.assert_close(tower(given), expected, **CLOSE)
    state = {key: value for key, value in reference.state_dict().items() if key.startswith("visual.")}
    with pytest.raises(WeightsError, match="missing: embed.positions"):
        load_clip(TextTower(config), "visual only", raw=state)


def test_loading_is_strict() -> None:
    state = theirs("gelu").state_dict()
    before = {name: value.clone() for name, value in ours("gelu").state_dict().items()}
    model = ours("gelu")
    model.load_state_dict(before)
    broken: dict[str, dict[str, Tensor]] = {
        "missing: visual.norm_pre.bias": {key: value for key, value in state.items() if key != "visual.ln_pre.bias"},
        "unexpected: visual.blocks.0.ls_1.gamma": state | {"visual.transformer.resblocks.0.ls_1.gamma": torch.ones(48)},
        r"mismatched: text.embed.positions \[77, 32\]": state | {"positional_embedding": torch.ones(77, 32)},
        "no CLIP with transformer towers": {"visual.attnpool.k_proj.weight": torch.ones(2)},
    }
    for expected, raw in broken.items():
        with pytest.raises(WeightsError, match=expected):
            load_clip(model, "broken", raw=raw)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "nothing was loaded"
    split = dict(hugging_face("gelu").state_dict())
    del split["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(WeightsError, match=r"text.blocks.1.attn.qkv.bias: key missing in the file beside query, value"):
        load_clip(model, "broken", raw=split)
    report = load_clip(
        model, "scale", raw={k: v for k, v in state.items() if k != "logit_scale"}, allow_missing=["logit_scale"]
    )
    assert report.missing == ["logit_scale"]


def test_activation_that_nobody_states_is_refused() -> None:
    """LAION's and OpenAI's weights have the same names and shapes; the wrong activation gives wrong features."""
    model = ours("gelu")
    model.config.activation, model.config.size = None, "H/14"
    with pytest.raises(WeightsError, match="set activation=quick_gelu"):
        load_clip(model, "laion", raw=theirs("gelu").state_dict())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"heads": 6}, "heads=3, the model has 6"),
        ({"text_heads": 2}, "text_heads=4, the model has 2"),
        ({"activation": "gelu"}, "activation=quick_gelu, the model has gelu"),
        ({"norm_eps": 1e-6}, "norm_eps=1e-05, the model has 1e-06"),
        ({"end_id": 30}, "end_id=49, the model has 30"),
    ],
)
def test_what_shapes_do_not_show_is_compared(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    hugging_face("quick_gelu").save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=expected):
        load_clip(ours(**{"activation": "quick_gelu", **change}), str(tmp_path))


def test_open_clip_config_is_compared(tmp_path: Path) -> None:
    safetensors.torch.save_file(theirs("gelu").state_dict(), tmp_path / "open_clip_model.safetensors")
    vision, text = {"width": 48, "head_width": 8}, {"heads": 4, "pool_type": "last"}
    config = {"model_cfg": {"quick_gelu": True, "vision_cfg": vision, "text_cfg": text}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError) as raised:
        load_clip(ours("gelu"), str(tmp_path))
    for expected in ("activation=quick_gelu", "heads=6, the model has 3", "pool_type=last, the model has argmax"):
        assert expected in str(raised.value)


def test_texts_end_where_they_end() -> None:
    images, ids = inputs()
    tower = ours("gelu").text
    assert tower.ends(ids).tolist() == [1, 4, 2, 9, 2]
    with torch.no_grad():
        whole = tower(ids)
        padded = ids.clone()
        padded[1, 5:] = 49
        torch.testing.assert_close(tower(padded), whole)
        torch.testing.assert_close(tower(ids[:2, :5]), whole[:2], **CLOSE)
    # A vocabulary with tokens behind the end, as transformers adds them.
    other = ours("gelu", end_id=30).text
    assert other.ends(torch.tensor([[48, 30, 0, 30], [1, 49, 2, 30]])).tolist() == [1, 3]
    with pytest.raises(RecipeError, match="positions for 10"):
        tower(torch.zeros(1, 11, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_are_read_from_left_to_right(dtype: torch.dtype) -> None:
    """In bfloat16 too, where attention on CPUs is written out."""
    tower = as_trained(ours("gelu").text).to(dtype)
    _, ids = inputs()
    later = ids.clone()
    later[3, 6:] = 11
    with torch.no_grad():
        before, after = (tower.forward_features(given).tokens for given in (ids, later))
    assert torch.equal(before[3, :6], after[3, :6]) and not torch.equal(before[3, 6:], after[3, 6:])


def test_images_of_other_sizes() -> None:
    tower = as_trained(ours("gelu").visual)
    images = torch.randn(2, 3, 32, 16)
    assert tower.forward_features(images).tokens.shape == (2, 1 + 4 * 2, 48)
    assert tower(images).shape == (2, 20)
    # Each position knows its row alone; stretched to 4 rows of 2, it must still be a row's.
    side = tower.embed.grid.height
    tower.embed.positions.data[1:] = torch.arange(float(side)).repeat_interleave(tower.embed.grid.width)[:, None]
    rows = stretch_class_table(tower.embed.positions, tower.embed.grid, Grid(1, 4, 2))[1:].unflatten(0, (4, 2))
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))
    assert (rows[1:, 0] > rows[:-1, 0]).all()
    with pytest.raises(RecipeError, match="images of 32x20"):
        tower(torch.randn(2, 3, 32, 20))
    with pytest.raises(RecipeError, match="blocks 0 to 2"):
        tower.forward_features(images, layers=(3,))


def test_recomputing_changes_no_gradient() -> None:
    reference, (images, ids) = theirs("gelu"), inputs()
    found = []
    for recompute in (False, True):
        model = CLIP(Config(**SIZES, activation="gelu"), recompute)
        load_clip(model, "memory", raw=reference.state_dict())
        output = model(images, ids)
        (output.images @ output.texts.t()).square().sum().backward()
        found.append([value.grad for name, value in model.named_parameters() if name != "logit_scale"])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_another_attention_on_the_same_weights() -> None:
    """Value-value attention (CLIP surgery) is put together of a block's parts; the towers stay as they are."""
    reference, (images, _) = theirs("quick_gelu"), inputs()
    tower = ours("quick_gelu").visual
    load_clip(tower, "memory", raw=reference.state_dict())
    block, theirs_ = tower.blocks[0], reference.visual.transformer.resblocks[0]
    with torch.no_grad():
        x = tower.norm_pre(tower.embed(images))
        query, key, value = block.attn.project(block.norm1(x))
        found = block.attn.mix(value, value, value)
        values = theirs_.ln_1(x) @ theirs_.attn.in_proj_weight[96:].t() + theirs_.attn.in_proj_bias[96:]
        values = values.unflatten(-1, (3, 16)).transpose(1, 2)
        mixed = (values @ values.transpose(-2, -1) / 4).softmax(-1) @ values
        expected = theirs_.attn.out_proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected, **CLOSE)


class Divided(Block):
    """A block with one more parameter, as a video tower has."""

    def __init__(self, index: int) -> None:
        super().__init__(48, 3, 192, 1e-5, bias="all", activation=quick_gelu)
        self.time = nn.Parameter(torch.full((48,), float(index)))

    def forward(self, x: Tensor, reduction: Any = None) -> Any:
        return super().forward(x + 0 * self.time)


def test_other_blocks_load_the_same_files() -> None:
    reference, (images, _) = theirs("quick_gelu"), inputs()
    tower = VisualTower(Config(**SIZES, activation="quick_gelu"), make_block=Divided).eval()
    report = load_clip(tower, "memory", raw=reference.state_dict(), allow_missing=["blocks.*.time"])
    assert report.missing == [f"blocks.{index}.time" for index in range(3)]
    torch.testing.assert_close(tower(images), reference.encode_image(images), **CLOSE)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("B/32", 151_277_313), ("B/16", 149_620_737), ("L/14", 427_616_513), ("H/14", 986_109_441)],
)
def test_published_sizes(size: Any, parameters: int) -> None:
    with torch.device("meta"):
        model = CLIP(Config(size=size))
    assert sum(value.numel() for value in model.parameters()) == parameters
    full = resolve(Config(size=size))
    assert full.activation == ("gelu" if size == "H/14" else "quick_gelu")
    assert model.visual.blocks[0].attn.heads == 16 if size == "H/14" else full.heads == full.dim // 64
    if size == "B/16":
        assert cost(Config(size=size))["image tower: blocks"] == pytest.approx(17.45e9, rel=0.01)


def test_what_can_not_be_built() -> None:
    assert check(Config(size="custom"))[0] == "model.patch_size: null, but model.size=custom has no default for it"
    problems = check(Config(heads=5, image_size=230, end_id=60_000), "objective.teacher")
    assert len(problems) == 3 and all(problem.startswith("objective.teacher.") for problem in problems)
    for word in ("patch_size", "heads", "text_heads", "text_dim", "context"):
        assert check(Config(**{word: 0})) == [f"model.{word}: found 0, allowed: more than 0"]
    with pytest.raises(RecipeError, match="does not divide"):
        CLIP(Config(text_heads=3))
