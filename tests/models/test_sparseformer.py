"""SparseFormers: published sizes and costs, where they look, what they are not given, weights in and out."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import RecipeError, WeightsError
from pretrain.models.classifier_weights import load_pretrained
from pretrain.models.formats import export_official
from pretrain.models.gradient_limits import follow_loss_scale
from pretrain.models.sparseformer import ARCHITECTURE, Config
from pretrain.models.sparseformer.architecture import UNCOUNTED
from pretrain.models.sparseformer.inflation import inflated, resampled
from pretrain.models.sparseformer.point_sampling import PUBLISHED_ROWS, PointSampler
from pretrain.models.sparseformer.regions import first_offsets, first_regions, moved, points_in, time_offsets
from pretrain.models.sparseformer.sparseformer_config import PRESETS, check, constants_of, resolve
from pretrain.models.sparseformer.sparseformer_model import SparseFormer
from pretrain.models.sparseformer.sparseformer_weights import export_sparseformer, official_names, own_names
from pretrain.models.sparseformer.units import Looks
from pretrain.models.vit import written_out_attention
from pretrain.models.weight_files import read_raw
from pretrain.models.weights import LoadReport, load_state

SMALL = {"size": "custom", "form": "v1", "tokens": 9, "focus_dim": 64, "dim": 128, "depth": 2, "repeats": 2,
         "points": 16, "channels": 8, "classes": 5}  # fmt: skip


def build(**changed) -> SparseFormer:
    torch.manual_seed(0)
    return SparseFormer(Config(**{**SMALL, **changed}))


def stirred(**changed) -> SparseFormer:
    """A model in which nothing is zero or one."""
    model = build(**changed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    return model.eval()


def clip(frames: int = 1, side: int = 32, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, frames, side, side + 8, 3, generator=generator)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("tiny", 31_522_212), ("small", 47_575_056), ("base", 81_076_996), ("augreg_base", 64_185_448),
        ("augreg_large", 212_426_984), ("clip_base", 63_809_664), ("clip_large", 212_188_476),
    ],
)  # fmt: skip
def test_published_sizes(size: str, parameters: int) -> None:
    with torch.device("meta"):
        model = SparseFormer(Config(size=size))
    assert sum(value.numel() for value in model.parameters()) == parameters


def test_every_published_size_is_tested() -> None:
    marks = [mark for mark in test_published_sizes.pytestmark if mark.name == "parametrize"]
    assert {size for size, _ in marks[0].args[1]} == set(PRESETS)


@pytest.mark.parametrize(
    ("size", "shape", "changed", "published", "executed"),
    [
        ("tiny", (1, 224, 224), {}, 2.07, 2.18),
        ("tiny", (1, 384, 384), {}, 2.42, None),
        ("tiny", (1, 512, 512), {}, 2.82, None),
        ("small", (1, 224, 224), {}, 3.85, 3.99),
        ("base", (1, 224, 224), {}, 7.82, 7.99),
        ("base", (1, 384, 384), {"tokens": 144}, 14.27, None),
        ("base", (1, 384, 384), {"tokens": 196}, 19.43, None),
        ("augreg_base", (1, 224, 224), {}, None, 3.78),
        ("augreg_large", (1, 224, 224), {}, None, 11.34),
        ("clip_base", (1, 384, 384), {}, None, 4.01),
        ("clip_large", (1, 384, 384), {}, None, 15.05),
        ("tiny", (32, 224, 224), {"video": True, "replicates": 8, "classes": 400}, 22.2, 23.1),
        ("small", (32, 224, 224), {"video": True, "replicates": 8, "classes": 400}, 38.0, 39.1),
        ("base", (32, 224, 224), {"video": True, "replicates": 8, "classes": 400}, 73.5, 75.0),
    ],
)
def test_published_costs(
    size: str, shape: tuple[int, int, int], changed: dict, published: float | None, executed: float | None
) -> None:
    macs = ARCHITECTURE(Config(size=size, **changed), SimpleNamespace(size=shape)).cost().macs
    total = sum(macs.values())
    if published is not None:
        assert (total - macs[UNCOUNTED]) / 1e9 == pytest.approx(published, rel=0.02)
    if executed is not None:
        assert total / 1e9 == pytest.approx(executed, rel=0.003)


def test_cost_counts_what_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's own counter, which knows no fused attention on CPUs."""
    from torch.utils.flop_counter import FlopCounterMode

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        return written_out_attention(query, key, value, 1.0)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    for changed in ({}, {"form": "bootstrapped"}, {"video": True, "replicates": 2}):
        model, frames = build(**changed).eval(), 3 if "video" in changed else 1
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(clip(frames, batch=1))
        cost = ARCHITECTURE(model.config, SimpleNamespace(size=(frames, 32, 40))).cost()
        assert counter.get_total_flops() / 2 == cost.published


def test_first_regions() -> None:
    """x goes with the slow index; what a square grid leaves over is the whole image."""
    found = first_regions(5)
    assert found.tolist() == [[0, 0, 0.5, 0.5], [0, 0.5, 0.5, 1], [0.5, 0, 1, 0.5], [0.5, 0.5, 1, 1], [0, 0, 1, 1]]
    tubes = first_regions(5, 2)
    assert tubes.shape == (10, 6) and torch.equal(tubes[5:, [0, 1, 3, 4]], found)
    assert tubes[:5, [2, 5]].unique().tolist() == [0, 0.5] and tubes[5:, [2, 5]].unique().tolist() == [0.5, 1]
    assert first_regions(1).isfinite().all()


def test_first_offsets() -> None:
    assert first_offsets(4, scattered=False).tolist() == [[-0.25, -0.25], [0.25, -0.25], [-0.25, 0.25], [0.25, 0.25]]
    torch.manual_seed(0)
    drawn, scattered = first_offsets(40, scattered=False), first_offsets(40, scattered=True)
    assert drawn.abs().max() <= 0.5 and torch.equal(scattered[:36], first_offsets(36, scattered=True))
    assert scattered[36:].abs().max() > 0.5


@pytest.mark.parametrize("points", [2, 9, 16, 36, 40])
def test_times_are_spread(points: int) -> None:
    times = time_offsets(points)
    assert sorted(times.tolist()) == pytest.approx([(cell + 0.5) / points - 0.5 for cell in range(points)])
    if points >= 9:
        directions = torch.stack((*first_offsets(points, scattered=True).T, times))
        assert torch.corrcoef(directions)[2, :2].abs().max() < 0.35, "time goes with a direction of the image"


def test_sizes_are_positive_and_signed() -> None:
    """A region whose corners changed places moves by its positive size, and turns its points round."""
    turned, straight = torch.tensor([[[1.0, 1, 0, 0]]]), torch.tensor([[[0.0, 0, 1, 1]]])
    change = torch.tensor([[[0.5, 0, 0, 0]]])
    assert torch.equal(moved(turned, change), moved(straight, change))
    offsets = torch.randn(1, 1, 9, 2)
    there, back = points_in(straight, offsets, 1e-5, 0.1), points_in(turned, offsets, 1e-5, 0.1)
    assert torch.allclose(there - 0.5, 0.5 - back)
    deviation = there.std(dim=2)
    assert torch.allclose(deviation, torch.full_like(deviation, 1 / 3), atol=1e-4)


def test_regions_may_leave_the_image() -> None:
    assert moved(torch.tensor([[[0.0, 0, 1, 1]]]), torch.tensor([[[3.0, 0, 0, 0]]])).max() > 3


def clamped(scale: float) -> Tensor:
    sampler = PointSampler("zeros", clamped=True, time_border=False)
    follow_loss_scale(sampler).value = scale
    points = (torch.rand(1, 3, 4, 2) * 0.5 + 0.25).requires_grad_()
    (sampler(torch.randn(1, 2, 10, 20), points) * 100).sum().backward()
    return points.grad


def test_gradients_of_points_are_clamped_by_the_loss_scale() -> None:
    """The map's height counts for both axes, officially."""
    torch.manual_seed(0)
    assert clamped(1.0).abs().max() == pytest.approx(1 / 10)
    torch.manual_seed(0)
    assert clamped(8.0).abs().max() == pytest.approx(8 / 10)


def test_another_forward_pass_does_not_change_the_clamp() -> None:
    sampler = PointSampler("zeros", clamped=True, time_border=False)
    scale, points = follow_loss_scale(sampler), torch.full((1, 1, 1, 2), 0.3, requires_grad=True)
    loss = (sampler(torch.randn(1, 2, 10, 10), points) * 1000).sum()
    scale.value = 64.0
    sampler(torch.randn(1, 2, 4, 4), torch.rand(1, 1, 1, 2))
    loss.backward()
    assert points.grad is not None and points.grad.abs().max() <= 0.1 + 1e-7


def test_the_clamp_is_that_of_the_published_batch() -> None:
    """On another number of ranks, of which each has more or fewer rows, a row's gradient is clamped alike."""
    gradients = []
    for rows in (2, 4):
        model = stirred().train()
        follow_loss_scale(model).rows = rows
        pixels, labels = clip().repeat(rows // 2, 1, 1, 1, 1), torch.tensor([0, 3]).repeat(rows // 2)
        # So large that the limit, of 128 rows, is reached.
        (F.cross_entropy(model(pixels), labels) * PUBLISHED_ROWS).backward()
        gradients.append(model.initial_roi.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


def test_a_scaled_loss_has_the_scaled_gradient() -> None:
    """As in fp16 training: the clamp acts on the gradient as it is without a scale."""
    gradients = []
    for scale in (1.0, 1024.0):
        model = stirred().train()
        follow_loss_scale(model).value = scale
        (F.cross_entropy(model(clip()), torch.tensor([0, 3])) * scale).backward()
        gradients.append(model.initial_roi.weight.grad / scale)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_time_gradients_are_of_the_order_of_space() -> None:
    """Spread times; with all in the middle, as officially, those of time are thousands of times larger."""
    ratios = {}
    for times in ("spread", "official"):
        model = build(video=True, replicates=2, temporal_offsets=times, parity="library")
        image = {name: value.detach() for name, value in stirred(parity="library").state_dict().items()}
        load_state(model, inflated(image, 2, times == "spread"), LoadReport("image", "own"))
        F.cross_entropy(model(clip(6)), torch.tensor([0, 3])).backward()
        gradient = model.layers[0].roi_offset_bias.grad.unflatten(0, (-1, 3))
        assert gradient.isfinite().all()
        ratios[times] = float(gradient[:, 2].norm() / gradient[:, :2].norm())
    assert 0.1 < ratios["spread"] < 10 and ratios["official"] > 1000, ratios


def test_a_step_moves_spread_times_little() -> None:
    """What the official start does not: points jump by parts of a clip at a change of 1e-5."""
    jumps = {}
    for times, eps in (("spread", 0.1), ("official", 1e-5)):
        offsets = torch.zeros(1, 1, 36, 3)
        offsets[..., :2] = first_offsets(36, scattered=True)
        if times == "spread":
            offsets[..., 2] = time_offsets(36)
        region = torch.tensor([[[0.0, 0, 0, 1, 1, 1]]])
        before = points_in(region, offsets, 1e-5, eps)
        after = points_in(region, offsets + 1e-5 * torch.randn(offsets.shape), 1e-5, eps)
        jumps[times] = float((after - before)[..., 2].abs().max())
    assert jumps["spread"] < 1e-3 and jumps["official"] > 0.1, jumps


@pytest.mark.parametrize("form", ["v1", "bootstrapped"])
def test_a_clip_of_one_frame_is_a_picture(form: str) -> None:
    """Also with RoI codes, whose times begin with zero weights."""
    image = stirred(form=form, parity="library")
    video = build(form=form, parity="library", video=True).eval()
    load_state(video, inflated(image.state_dict(), 1, spread=True), LoadReport("image", "own"))
    assert torch.allclose(image(clip()), video(clip()), atol=1e-5)


@pytest.mark.parametrize("tokens", [9, 14, 49, 196])
def test_any_number_of_tokens_and_any_size(tokens: int) -> None:
    model = build(tokens=tokens).eval()
    for height, width in ((32, 32), (40, 72), (33, 57)):
        pixels = torch.randn(1, 1, height, width, 3)
        assert model(pixels).shape == (1, 5)
        assert model.forward_features(pixels, pooled=False).shape == (1, tokens, 128)


def test_the_head_turns_features_into_logits() -> None:
    model = stirred(form="bootstrapped")
    logits = model.forward_head(model.forward_features(clip()))
    assert torch.equal(logits, model(clip()))
    assert torch.equal(logits, model(clip()[:, 0].permute(0, 3, 1, 2))), "pictures with channels first"
    assert model.forward_features(clip(), pooled=False).shape == (2, 10, 128), "the class token first"


def test_what_was_looked_at_is_told() -> None:
    model, looks = stirred(video=True, replicates=2), Looks()
    _, regions = model.encode(clip(4), looks)
    assert [tuple(one.shape) for one in looks.points] == [(2, 18, 16, 3)] * 3
    assert torch.equal(looks.regions[-1], regions) and len(looks.moves) == 3
    assert all(one.dtype == torch.float32 for one in (*looks.points, *looks.regions))


def test_regions_stay_float32_in_half_types() -> None:
    model = stirred()
    exact, half = Looks(), Looks()
    model.encode(clip(), exact)
    model.to(torch.bfloat16).encode(clip(), half)
    assert all(one.dtype == torch.float32 for one in (*half.points, *half.moves, *half.samples))
    assert (half.points[0] - exact.points[0]).abs().max() < 0.03
    values = half.moves[0].detach()
    assert not torch.equal(values, values.bfloat16().float()), "rounded on the way"
    assert model(clip()).dtype == torch.bfloat16


def test_ablations() -> None:
    still, looks = stirred(adjust=False), Looks()
    still.encode(clip(), looks)
    assert not looks.moves and torch.equal(looks.regions[0], looks.regions[-1])
    static, looks = stirred(offsets="static"), Looks()
    static.encode(clip(), looks)
    relative = (looks.points[0] - looks.regions[0].unflatten(-1, (2, 2)).mean(2)[:, :, None]) / (
        looks.regions[0][..., 2:] - looks.regions[0][..., :2]
    )[:, :, None]
    assert torch.allclose(relative, relative[:1, :1].expand_as(relative), atol=1e-5)


def test_repeats_share_weights_and_not_their_stochastic_depth() -> None:
    model = build(drop_path=0.3)
    rates = [getattr(paths["attend"], "rate", 0.0) for layer in model.layers if hasattr(layer, "drop_paths")
             for paths in layer.drop_paths]  # fmt: skip
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    boot = build(form="bootstrapped", drop_path=0.3)
    assert isinstance(boot.layers[0].drop_paths[1]["move"], nn.Identity), "moves are never dropped there"
    assert not isinstance(model.layers[0].drop_paths[1]["move"], nn.Identity)


def test_first_weights() -> None:
    model = build(parity="library")
    unit = model.layers[0]
    assert (unit.roi_offset_module[1].weight == 0).all() and (unit.roi_adjust_module[1].weight == 0).all()
    assert (build(parity="train").layers[0].roi_offset_module[1].weight != 0).any()
    for module in (unit.roi_offset_module[0], unit.roi_adjust_module[0], unit.adaptive_mixing.parameter_generator[0]):
        assert (module.weight == 64**-0.5).all()
    assert (unit.adaptive_mixing.parameter_generator[2].weight == 0).all()
    assert unit.adaptive_mixing.parameter_generator[2].bias.std() > 0.1
    assert torch.equal(model.initial_roi.weight.detach(), first_regions(9))
    assert 0.8 < model.initial_embedding.weight.std() < 1


@pytest.mark.parametrize("recompute", [True, "selective"])
def test_checkpointing_changes_nothing(recompute: bool | str) -> None:
    gradients = []
    for asked in (False, recompute):
        model = stirred().train()
        model.activation_checkpointing = asked
        F.cross_entropy(model(clip()), torch.tensor([0, 3])).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    assert all(torch.allclose(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize(
    ("changed", "frames", "told"),
    [
        ({"dim": 100}, 1, "model.focus_dim, model.dim: found 100, allowed: a multiple of 64"),
        ({"points": 1}, 1, "model.points: found 1, allowed: 2 or more"),
        ({"tokens": None}, 1, "model.tokens: null, but model.size=custom has no default"),
        ({"tokens": 0}, 1, "model.tokens: found 0"),
        ({"drop_path": 1.0}, 1, "model.drop_path=1.0"),
        ({"units": ["attend mlp"]}, 1, "model.units: none samples"),
        ({"units": ["look mlp"]}, 1, "model.units: found look, allowed: attend, code, mlp, move, sample"),
        ({"units": []}, 1, "model.units: found 0, allowed: 1 or more"),
        ({"form": "bootstrapped", "units": ["sample"]}, 1, "model.units: found 1, allowed: 3 or more"),
        ({"form": "bootstrapped", "parity": "train"}, 1, "model.parity: found train, allowed with bootstrapped"),
        ({}, 4, "input.frames=4: an image model takes single pictures; set model.video=true"),
        ({"replicates": 8}, 1, "model.replicates=8: an image has one slice; set model.video=true"),
        ({"video": True, "time_eps": 0.0}, 1, "model.time_eps=0, allowed: more than 0"),
    ],
)
def test_what_cannot_be_built(changed: dict, frames: int, told: str) -> None:
    problems = check(Config(**{**SMALL, **changed}), frames)
    assert len(problems) == 1 and told in problems[0], problems


def test_clips_are_not_given_to_an_image_model() -> None:
    with pytest.raises(RecipeError, match="clips of 2 frames: an image model takes single pictures"):
        build()(clip(2))


def test_units_one_by_one() -> None:
    """A ViT-shaped model that looks again in every third unit, the class token left out of it."""
    looking, plain = "sample attend mlp move code", "attend mlp"
    units = [looking, plain, plain, looking, plain, plain]
    model = build(form="bootstrapped", focus_dim=64, dim=64, repeats=1, units=units).eval()
    looks = Looks()
    tokens, regions = model.encode(clip(), looks)
    assert tokens.shape == (2, 10, 64) and regions.shape == (2, 9, 4) and len(looks.points) == 2
    assert model.layers[0].stage_embedding is None


def test_layers_and_rates() -> None:
    found = ARCHITECTURE(Config(**SMALL, region_lr_scale=0.1), SimpleNamespace(size=(1, 32, 32)))
    layers = {name: found.layer_of(name) for name, _ in build().named_parameters()}
    assert layers["feat_extractor.conv1.weight"] == (0, 4) and layers["head.bias"] == (4, 4)
    assert layers["layers.0.norm1.weight"] == layers["layers.1.0.weight"] == (1, 4)
    assert layers["layers.2.norm1.weight"] == (2, 4) and layers["layers.3.norm1.weight"] == (3, 4)
    assert found.lr_scale("layers.0.roi_adjust_module.1.weight") == found.lr_scale("initial_roi.weight") == 0.1
    assert found.lr_scale("layers.0.attn.qkv.weight") == 1
    assert not found.decays("initial_roi.weight", (9, 4)) and found.decays("initial_embedding.weight", (9, 64))


@pytest.mark.parametrize("layout", ["train", "library"])
def test_released_names_there_and_back(layout: str, tmp_path: Path) -> None:
    """By default in the names of the code whose constants the model has."""
    model = stirred(parity=layout)
    export_official(model, str(tmp_path / "model.pth"))
    written = read_raw(str(tmp_path / "model.pth"))
    assert ("token_roi.weight" in written) is (layout == "train")
    export_sparseformer(model, str(tmp_path / "named.pth"), layout)
    named = read_raw(str(tmp_path / "named.pth"))
    assert list(named) == list(written) and all(torch.equal(named[name], written[name]) for name in named)
    again = build(parity=layout)
    report = load_state(again, own_names(written), LoadReport("file", layout))
    assert not report.missing and not report.unexpected
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_library_writes_clips_with_an_axis_of_time() -> None:
    state = build(video=True).state_dict()
    assert official_names(state, "library", video=True)["feat_extractor.conv1.weight"].shape == (8, 3, 1, 7, 7)
    with pytest.raises(WeightsError, match="image models of v1 alone"):
        official_names(state, "train", video=True)


def test_a_head_that_a_converter_left_out_is_missed() -> None:
    """The official converter leaves the head's old names, and the official loader a random head without a word."""
    written = official_names(build().state_dict(), "library")
    written["head.norm.weight"] = written.pop("norm.weight")
    written["head.classifier.weight"] = written.pop("proj.weight")
    with pytest.raises(WeightsError, match=r"missing: norm.weight"):
        load_pretrained(build(), "file", raw=written)


def test_research_checkpoints() -> None:
    """Centres and sizes of regions, blocks counted anew, other names for class token and norm; the code has less."""
    model = stirred(form="bootstrapped")
    state = official_names(model.state_dict(), "library")
    low, high = state.pop("initial_roi.weight").chunk(2, dim=1)
    old = {"token_roi_cc.weight": (low + high) / 2, "token_roi_wh.weight": high - low,
           "global_roi.weight": torch.zeros(1, 4)}  # fmt: skip
    for key, value in state.items():
        for number in (3, 4):
            key = key.replace(f"layers.{number}.", f"blocks.{number - 3}.")
        key = f"ln_post{key[4:]}" if key.startswith("norm.") else key.replace("cls_embedding", "global_embedding")
        old[key] = value
    again = build(form="bootstrapped")
    load_state(again, own_names(old), LoadReport("file", "research"))
    assert torch.allclose(again.eval()(clip()), model(clip()), atol=1e-5)


def test_another_number_of_tokens() -> None:
    """Regions of a grid lie on the new grid; tokens that look at the whole image still do."""
    state = build(tokens=11).state_dict()
    found = resampled(state, 18)
    assert torch.allclose(found["initial_roi.weight"], first_regions(18), atol=1e-5)
    assert found["initial_embedding.weight"].shape == (18, 64)
    assert torch.allclose(found["initial_embedding.weight"][16:], state["initial_embedding.weight"][9:].mean(0))
    same = resampled(state, 9)["initial_embedding.weight"]
    assert torch.allclose(same, state["initial_embedding.weight"][:9], atol=1e-5)


def test_weights_are_fitted_to_the_model(caplog: pytest.LogCaptureFixture) -> None:
    image = official_names(stirred().state_dict(), "train")
    options = Config(**{**SMALL, "tokens": 16}, video=True, replicates=3)
    found = ARCHITECTURE(options, SimpleNamespace(size=(4, 32, 32))).own_weights(image)
    report = load_state(SparseFormer(options), found, LoadReport("image", "train"))
    assert not report.missing and "9 tokens are interpolated for 16" in caplog.text


def test_constants_of_the_codes() -> None:
    train, library = resolve(Config()), resolve(Config(parity="library"))
    assert train.parity == "train" and train.clamp_points and not library.clamp_points
    assert constants_of(library).generator_eps == 1e-5 and constants_of(library).norm_eps == 1e-6
    assert resolve(Config(size="clip_base")).parity == "library"
    assert constants_of(resolve(Config(size="augreg_base", norm_eps=1e-6))).generator_eps == 1e-6


def test_memory_of_a_larger_picture_is_that_of_its_map() -> None:
    """Nothing behind the map grows with the picture."""
    sizes = []
    for side in (32, 64):
        model, kept = build().train(), []
        maps = model.feat_extractor(clip(side=side)).detach()
        keep = torch.autograd.graph.saved_tensors_hooks(lambda one, kept=kept: kept.append(one) or one, lambda one: one)
        with keep:
            tokens, regions = model.initial_embedding().expand(2, 9, -1), model.initial_roi().expand(2, -1, -1)
            model.layers[0](tokens, regions, maps)
        pointers = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in kept}
        sizes.append(sum(size for pointer, size in pointers.items() if pointer != maps.untyped_storage().data_ptr()))
    assert sizes[0] == sizes[1] and math.isfinite(sizes[0])
