"""Official SparseFormers: maps, tokens, regions, points, samples, mixing, logits and gradients of both image codes,
of bootstrapped models and of clips; both layouts of weights; inflation."""

import math
import re

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from pretrain.models.sparseformer.inflation import inflated
from pretrain.models.sparseformer.regions import TOP_FREQUENCY, region_code
from pretrain.models.sparseformer.sparseformer_config import Config, layout_of
from pretrain.models.sparseformer.sparseformer_model import SparseFormer
from pretrain.models.sparseformer.sparseformer_weights import official_names, own_names
from pretrain.models.sparseformer.units import Looks, Unit
from pretrain.models.weights import LoadReport, load_state

KINDS = ("sparseformer", "sparseformer_lib", "sparseformer_video", "sparseformer_bootstrap")
#: Operations as the files name them.
OPERATIONS = {"ATTN": "attend", "ROI_ADJ": "move", "SAMPLING_MIX": "sample", "MLP": "mlp", "PE_INJECT": "code"}


def config_of(case, **changed) -> Config:
    """The model that meta.json describes."""
    given = case.meta["config"]
    if case.kind == "sparseformer":
        (focus, dim), (once, depth) = given["width_configurations"], given["block_sizes"]
        assert once == 1 and given["repeats"][1:] == [1]
        return Config(
            size="custom", form="v1", parity="train", tokens=given["num_latent_tokens"], focus_dim=focus, dim=dim,
            depth=depth, repeats=given["repeats"][0], points=given["token_sampling_points"],
            channels=given["conv_dim"], classes=case.meta["num_classes"], drop_path=given["drop_path_rate"],
        )  # fmt: skip
    widths, compatible = given["width_configs"], given["compatible"]
    bootstrapped = not compatible["mixing_bias"]
    assert len(set(widths[1:])) == 1 and set(given["repeats"][1:]) == {1}
    # What has no option here must be what the form is built with.
    assert given["same_token_embedding"] == compatible["use_stage_embedding"] == bootstrapped
    assert compatible["transition_ln"] != bootstrapped and not compatible["restrict_grad_norm"]
    assert (compatible["type_num_attn_heads"], compatible["type_op_adjust"]) == ((2, 2) if bootstrapped else (1, 1))
    assert given["head_op"] == ("cls" if bootstrapped else "avg")
    padding = "border" if bootstrapped else "zeros"
    sampling = {"mode": "bilinear", "padding_mode": padding, "align_corners": False}
    assert compatible["grid_sample_config"] == sampling and given.get("cls_token_insert_layer", 2) == 2
    hidden = compatible["pg_inner_dim"]
    return Config(
        size="custom", form="bootstrapped" if bootstrapped else "v1", parity="library",
        tokens=given["num_latent_tokens"], focus_dim=widths[0], dim=widths[-1],
        depth=len(widths) - (2 if bootstrapped else 1), repeats=given["repeats"][0],
        points=given["num_sampling_points"], channels=given["conv_dim"], classes=given["proj_dim"],
        head_bias=given["proj_bias"], norm_eps=compatible["ln_eps"],
        generator_dim=hidden if isinstance(hidden, int) else None,
        activation="quick_gelu" if compatible["clip_quick_gelu"] else "gelu", **changed,
    )  # fmt: skip


def operations_of(text: str, units: int) -> list[tuple[str, ...]]:
    """Operations by unit, as the words of meta.json say."""
    words = re.sub(r"\(.*?\)|cls token prepended;", "", text).replace("unit0 and unit1:", "unit0:")
    found: list[tuple[str, ...]] = []
    for part in words.split(";"):
        names = tuple(OPERATIONS[name] for name in re.findall("|".join(OPERATIONS), part))
        found.append(names or found[-1])
    return found + [found[-1]] * (units - len(found))


def build(case, weights: dict[str, Tensor], **changed) -> SparseFormer:
    model = SparseFormer(config_of(case, **changed)).eval()
    load_state(model, own_names(weights), LoadReport(case.name, "official"))
    return model


def images(case) -> Tensor:
    """Clips [B, T, H, W, 3] of the input."""
    given = case.tensors()["input"]
    return (given[:, :, None] if given.ndim == 4 else given).permute(0, 2, 3, 4, 1)


def forward(case, model: SparseFormer) -> dict[str, Tensor]:
    """Everything that the files name of a forward pass, and the gradients."""
    found: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def keep(name: str, output: Tensor) -> None:
        number = counts[name] = counts.get(name, -1) + 1
        found[f"{name}.{number}"] = output

    def watch(module: torch.nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _module, _inputs, output: keep(name, output))

    watch(model.feat_extractor, "early_conv")
    for index, layer in enumerate(model.layers):
        if isinstance(layer, Unit):

            def whole(_module, _inputs, output, index=index):
                found[f"layer{index}.tokens.0"], found[f"layer{index}.roi.0"] = output

            layer.register_forward_hook(whole)
        else:
            watch(layer, f"layer{index}.tokens")
        for name in ("adaptive_mixing", "pe_transition"):
            if hasattr(layer, name):
                watch(getattr(layer, name), f"layers.{index}.{name}")
    looks = Looks()
    tokens, regions = model.encode(images(case), looks)
    found |= {"final_normed_tokens": model.norm(tokens), "final_roi": regions}
    logits = model(images(case))
    loss = F.cross_entropy(logits, case.tensors()["labels"])
    model.zero_grad()
    (loss * case.meta["gain"]).backward()
    names = {"sampling_points": looks.points, "translate_to_absolute_coordinates": looks.points,
             "sampled_features": looks.samples, "feat_sampling_2d": looks.samples, "roi_adjust": looks.moves,
             "position_encoding": looks.codes}  # fmt: skip
    for name, values in names.items():
        axis = [2] if "feat" in name or "points" in name or "coordinates" in name else []
        for index, value in enumerate(values):
            found[f"{name}.{index}"] = value[:, :, None] if axis else value
    return found | {"logits": logits, "loss": loss[None]} | gradients(case, model)


def gradients(case, model: SparseFormer) -> dict[str, Tensor]:
    own = {name: value.grad for name, value in model.named_parameters()}
    assert all(value is not None for value in own.values())
    layout = "train" if case.kind == "sparseformer" else "library"
    return {f"grad.{name}": value for name, value in official_names(own, layout, model.config.video).items()}


def compare(case, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare with the tolerances that meta.json states in words."""
    words = case.meta["tolerance"]
    forward_share = float(re.fullmatch(r"max \|diff\| <= (\S+) \* max\(1, max\|ref\|\)", words["forward"])[1])
    gradient_share = float(re.fullmatch(r"max \|diff\| <= (\S+) \* max\|ref\|", words["gradients"])[1])
    assert expected and set(expected) <= set(found), f"not computed: {sorted(set(expected) - set(found))}"
    for name, one in expected.items():
        got, largest = found[name].detach(), float(one.abs().max())
        if case.kind == "sparseformer" and name.startswith("roi_adjust"):
            got = got.transpose(0, 1)
        assert got.shape == one.shape, f"{name}: {tuple(got.shape)}, expected {tuple(one.shape)}"
        allowed = gradient_share * largest if name.startswith("grad") else forward_share * max(1.0, largest)
        if name.startswith("position_encoding"):
            allowed += rounding_of_codes(case, found, int(name.rpartition(".")[2]))
        far = float((got - one).abs().max())
        assert far <= allowed, f"{name}: {far:.2e} > {allowed:.2e}"


def rounding_of_codes(case, found: dict[str, Tensor], number: int) -> float:
    """How far codes may be off since regions are, by their own rounding.

    The highest frequency multiplies a difference by 400; in float64 the files' codes are off by five tolerances.
    """
    if number == 0:
        return 0.0  # of the table itself
    name = f"roi_adjust.{number - 1}"
    return math.pi * TOP_FREQUENCY * float((found[name] - case.tensors()[name]).abs().max())


def test_every_tensor(case) -> None:
    expected = {name: one for name, one in case.tensors().items() if name not in ("input", "labels")}
    weights = load_file(case.weights)
    if case.kind == "sparseformer_video":
        prefix = "random3d."
        expected = {name.removeprefix(prefix): one for name, one in expected.items() if name.startswith(prefix)}
        model = build(case, weights, **clips_of(case, "official"))
    else:
        expected = {name: one for name, one in expected.items() if not name.startswith("grad_unclamped")}
        model = build(case, weights)
    assert {*layout_of(model.config)} and set(weights) == set(names_of(case, model))
    if case.kind != "sparseformer":
        units = layout_of(model.config)
        text = case.meta["config"].get("ops", case.meta.get("ops"))
        assert [unit.operations for unit in units] == operations_of(text, len(units))
    compare(case, forward(case, model), expected)


def test_codes_of_the_files_regions(case) -> None:
    """Codes by themselves: of regions as they are in the files."""
    tensors = case.tensors()
    for name in [name for name in tensors if name.startswith("position_encoding")]:
        number = int(name.rpartition(".")[2])
        regions = tensors[f"roi_adjust.{number - 1}"] if number else load_file(case.weights)["initial_roi.weight"][None]
        found = region_code(regions, tensors[name].shape[-1]).expand(tensors[name].shape)
        compare(case, {"code": found}, {"code": tensors[name]})


def names_of(case, model: SparseFormer) -> dict[str, Tensor]:
    layout = "train" if case.kind == "sparseformer" else "library"
    return official_names(model.state_dict(), layout, model.config.video)


def clips_of(case, times: str) -> dict:
    return {"video": True, "replicates": case.meta["config"]["replicates"], "temporal_offsets": times}


def test_gradients_without_the_clamp(case) -> None:
    """Of train code alone; the table of regions, on which the clamp acts most."""
    name = "grad_unclamped.token_roi.weight"
    if name not in case.tensors():
        return
    model = SparseFormer(config_of(case)).eval()
    model = SparseFormer(Config(**{**vars(model.config), "clamp_points": False})).eval()
    load_state(model, own_names(load_file(case.weights)), LoadReport(case.name, "official"))
    found = forward(case, model)["grad.token_roi.weight"]
    compare(case, {name: found}, {name: case.tensors()[name]})


def test_inflation(case) -> None:
    if case.kind != "sparseformer_video":
        return
    tensors, weights = case.tensors(), load_file(case.folder / "weights_2d.safetensors")
    replicates, image = case.meta["config"]["replicates"], own_names(weights)
    grown = official_names(inflated(image, replicates), "library", video=True)
    prefix = "inflated_weight."
    changed = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
    assert all(torch.equal(grown[name], one) for name, one in changed.items())
    assert all(torch.equal(grown[name], weights[name]) for name in weights if name not in changed)
    model = SparseFormer(config_of(case, **clips_of(case, "official"))).eval()
    load_state(model, inflated(image, replicates), LoadReport(case.name, "inflated"))
    prefix = "inflated."
    expected = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
    compare(case, forward(case, model), expected)


def test_single_frame(case) -> None:
    """An inflated model of one slice gives a picture the image model's answer, in both ways to place points in time."""
    if case.kind != "sparseformer_video":
        return
    tensors, image = case.tensors(), own_names(load_file(case.folder / "weights_2d.safetensors"))
    frame = images(case)[:, :1]
    flat = SparseFormer(config_of(case)).eval()
    load_state(flat, image, LoadReport(case.name, "library"))
    found = {"single_frame.logits_2d": flat(frame)}
    compare(case, found, {name: tensors[name] for name in found})
    for times in ("official", "spread"):
        model = SparseFormer(config_of(case, video=True, temporal_offsets=times)).eval()
        load_state(model, inflated(image, 1, times == "spread"), LoadReport(case.name, "inflated"))
        found = {"single_frame.logits_3d": model(frame)}
        compare(case, found, {name: tensors[name] for name in found})
