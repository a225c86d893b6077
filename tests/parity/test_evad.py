"""Official EVAD: every tensor of the forward pass in both token orders, answers, losses, matchings, gradients."""

import functools

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from finetune.detection.answers import answers_of
from finetune.evad.selection import clipped_boxes, person_scores, select_persons
from finetune.evad.set_losses import mean_of_terms, set_losses
from finetune.evad.set_matching import AnnotatedPersons, match_all
from pretrain.models.evad import localisation
from pretrain.models.evad.detector import EVAD
from pretrain.models.evad.detector_config import Config
from pretrain.models.evad.detector_weights import load_detector
from pretrain.samples.box_transforms import CONVENTIONS, scale_boxes

KINDS = ("evad",)
#: Names of the two token orders in the files.
ORDERS = {"eval": "official", "eval_sorted": "positional"}


def config_of(case, run: str, token_order: str) -> Config:
    """The model that meta.json describes."""
    given, defaults = case.meta["config"], case.meta["defaults_used"]
    rcnn, context, pool = "MODEL.SparseRCNN.", "MODEL.CRD.", "MODEL.ROI_BOX_HEAD."
    # What has no option here must be what the model is built with.
    constants = {"NUM_DYNAMIC": 2, "NUM_CLS": 1, "NUM_REG": 3, "NUM_ACT": 1, "CLASS_WEIGHT": 2.0, "GIOU_WEIGHT": 2.0,
                 "L1_WEIGHT": 5.0, "NO_OBJECT_WEIGHT": 0.1, "rcnn_layernorm_eps": 1e-5}  # fmt: skip
    assert {name: defaults[name] for name in constants} == constants and given[f"{pool}POOLER_SAMPLING_RATIO"] == 2
    assert defaults["SPATIAL_SCALE_FACTOR"] == defaults["PATCH_SIZE"]
    return Config(
        size="custom", patch_size=defaults["PATCH_SIZE"], tubelet=defaults["TUBELET_SIZE"],
        dim=given["ViT.EMBED_DIM"], depth=given["ViT.DEPTH"], heads=given["ViT.NUM_HEADS"],
        mlp_ratio=defaults["MLP_RATIO"], classes=given["MODEL.NUM_CLASSES"], drop_path=0.0,
        norm_eps=defaults["vit_layernorm_eps"], pretrain_side=given["ViT.PRETRAIN_IMG_SIZE"], positions="official",
        keyframe_weight=case.meta["runs"][run]["enhanced_weight"], keep_rate=1.0, token_order=token_order,
        fpn_blocks=given["ViT.FPN_INDICES"], queries=given[f"{rcnn}NUM_PROPOSALS"],
        rcnn_heads=given[f"{rcnn}NUM_HEADS"], query_dim=given[f"{rcnn}HIDDEN_DIM"],
        query_heads=given[f"{rcnn}NHEADS"], query_hidden=given[f"{rcnn}DIM_FEEDFORWARD"],
        dynamic_dim=given[f"{rcnn}DIM_DYNAMIC"], pool_size=given[f"{pool}POOLER_RESOLUTION"],
        action_pool_size=defaults["ROI_XFORM_RESOLUTION"], decoder_dim=given[f"{context}EMBED_DIM"],
        decoder_depth=given[f"{context}DEPTH"], decoder_heads=given[f"{context}NUM_HEADS"], decoder_drop_path=0.0,
        action_hidden=given[f"{rcnn}ACT_FC_DIM"], roi_extension=tuple(given[f"{context}ROI_EXTENSION"]),
    )  # fmt: skip


def build(case, run: str, token_order: str = "official") -> EVAD:
    info, frames = case.meta["runs"][run], case.meta["config"]["DATA.NUM_FRAMES"]
    config = config_of(case, run, token_order)
    model = EVAD(config, frames, 4 * config.patch_size, 4 * config.patch_size)
    load_detector(model, case.weights, load_file(case.weights))
    model.prune(info["keep_rates"], info["enhanced_weight"])
    return model


def clips(case, run: str) -> tuple[Tensor, Tensor]:
    """Clips [B, T, H, W, 3], padded to multiples of 32, and their sizes."""
    tensors, sizes = case.tensors(), torch.tensor(case.meta["runs"][run]["frame_sizes_hw"])
    height, width = (int(-(-side // 32) * 32) for side in sizes.amax(0))
    found = [tensors[f"{run}.input{index}"].float() / 32 for index in range(len(sizes))]
    padded = [F.pad(one, (0, width - one.shape[3], 0, height - one.shape[2])) for one in found]
    return torch.stack(padded).permute(0, 2, 3, 4, 1), sizes


def persons_of(case, run: str) -> AnnotatedPersons:
    tensors, sizes = case.tensors(), torch.tensor(case.meta["runs"][run]["frame_sizes_hw"])
    boxes = [tensors[f"{run}.gt_boxes{index}"] for index in range(len(sizes))]
    labels = [tensors[f"{run}.gt_labels{index}"] for index in range(len(sizes))]
    return AnnotatedPersons(torch.cat(boxes), torch.cat(labels), torch.tensor([len(one) for one in boxes]), sizes)


def first_of(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def watched(model: EVAD, found: dict[str, Tensor]) -> None:
    """Let modules put what they compute into `found`, under the names of the files."""

    def keep(name: str, module: torch.nn.Module, change=first_of) -> None:
        module.register_forward_hook(lambda _m, _i, output: found.__setitem__(name, change(output).detach()))

    keep("patch_embed", model.patch_embed)
    keep("encoder_out", model.norm)
    keep("enc_to_dec", model.det_head.encoder_to_decoder)
    for index, block in enumerate(model.blocks):
        keep(f"block{index}.x", block)
    for index, head in enumerate(model.det_head.s0_headseries):
        keep(f"rcnn{index}.features", head, lambda output: output[2].flatten(0, 1)[None])
    model.det_head.decoder.blocks[0].register_forward_pre_hook(
        lambda _module, inputs: found.__setitem__("decoder_in", inputs[0].detach())
    )


def kept_indices(tokens, blocks: int, places: int, keyframe: int, batch: int) -> dict[str, Tensor]:
    """Kept tokens beside the keyframe's behind each block, and their scores where some are dropped."""
    found, index = {}, torch.arange(places - keyframe).expand(batch, -1)
    steps = {step.block: (number, step) for number, step in enumerate(tokens.steps)}
    for block in range(blocks):
        if block in steps:
            number, step = steps[block]
            found[f"prune{number}.scores"] = step.score[:, keyframe:]
            index = index.gather(1, step.kept[:, keyframe:] - keyframe)
        found[f"block{block}.idx"] = index
    dropped = torch.ones(batch, places - keyframe, dtype=torch.uint8)
    return found | {"dropped_mask": dropped.scatter(1, index, 0)}


def answers(case, run: str, found, sizes: Tensor) -> dict[str, Tensor]:
    """The answers under the names of the files."""
    info, rules = case.meta["runs"][run], CONVENTIONS["slowfast"]
    batch = {"sizes": sizes, "originals": torch.tensor(info["original_sizes_hw"]),
             "videos": [str(index) for index in range(len(sizes))],
             "times": torch.arange(902, 902 + len(sizes))}  # fmt: skip
    answer = select_persons(found, sizes, info["person_threshold"])
    assert answer.counts == info["n_selected"]
    detections = answers_of(batch, answer.boxes.numpy(), answer.scores.numpy(), answer.counts, rules)
    rows = [torch.cat((torch.full((len(one.boxes), 1), index), torch.from_numpy(one.boxes)), dim=1)
            for index, one in enumerate(detections)]  # fmt: skip
    pixels = [scale_boxes(boxes.numpy(), (w, h), (old_w, old_h)) for boxes, (h, w), (old_h, old_w)
              in zip(clipped_boxes(found, sizes), sizes.tolist(), info["original_sizes_hw"], strict=True)]  # fmt: skip
    return {
        "out.action_scores": torch.cat([torch.from_numpy(one.scores) for one in detections]),
        "out.boxes": torch.cat(rows),
        "out.metadata": torch.tensor([[int(one.video), int(one.time)] for one in detections for _ in one.boxes]),
        "out.person_boxes": torch.stack([torch.from_numpy(one) for one in pixels]),
        "out.person_scores": person_scores(found),
    }


@torch.no_grad()
def forward(case, run: str, model: EVAD) -> dict[str, Tensor]:
    """Everything that the files name of a forward pass."""
    video, sizes = clips(case, run)
    grid, batch = model.grid_of(video), len(video)
    tokens = model.encode(video, grid)
    found = kept_indices(tokens, len(model.blocks), grid.tokens, grid.slice, batch)
    found |= {f"fpn_p{level}": one for level, one in zip((2, 3, 4, 5), model.pyramid(tokens, grid), strict=True)}
    watched(model, found)
    predictions = model(video, sizes)
    embedded = found["patch_embed"].transpose(1, 2).unflatten(2, (grid.time, grid.height, grid.width))
    persons = found["decoder_in"][:, -predictions.boxes[0].shape[1] :].flatten(0, 1)
    found |= {
        "patch_embed": embedded,
        "grid_thw": torch.tensor([grid.time, grid.height, grid.width]),
        "images_whwh": localisation.frame_scale(sizes),
        "init_boxes_abs": localisation.absolute_boxes(model.init_proposal_boxes(), sizes),
        "roi_features": persons,
    }
    for index, (logits, boxes) in enumerate(zip(predictions.person_logits, predictions.boxes, strict=True)):
        found |= {f"rcnn{index}.logits": logits, f"rcnn{index}.boxes": boxes}
    found |= {f"decoder{index}.action_logits": one for index, one in enumerate(predictions.action_logits)}
    return found | answers(case, run, predictions, sizes)


@pytest.mark.parametrize("order", ORDERS)
def test_every_tensor_of_the_forward_pass(case, order: str) -> None:
    """Both token orders; in the files the positional one has only runs and tensors that differ."""
    compared = [compare_forward(case, run, order) for run in case.meta["runs"]]
    assert any(compared)


def compare_forward(case, run: str, order: str) -> int:
    """Compare a run; tells how many tensors there were."""
    prefix = f"{run}.{order}."
    expected = {name.removeprefix(prefix): one for name, one in case.tensors().items() if name.startswith(prefix)}
    if not expected:
        return 0
    found = forward(case, run, build(case, run, ORDERS[order]).eval())
    assert set(expected) <= set(found), f"not computed: {sorted(set(expected) - set(found))}"
    tolerance = case.meta["tolerance"]
    for name, one in expected.items():
        near = {"atol": tolerance["eval_atol"], "rtol": tolerance["eval_rtol"]}
        if not one.is_floating_point():
            near = {"atol": 0, "rtol": 0}
        elif name.endswith("boxes") and name != "out.boxes":
            near = {"atol": tolerance["boxes_atol_pixels"], "rtol": 0}
        assert_close(found[name], one, **near, msg=lambda text, name=name: f"{prefix}{name}: {text}")
    return len(expected)


def trained(case, run: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[list[Tensor]]]:
    """Loss terms, gradients, and matchings by head and clip, of one step."""
    model, persons = build(case, run).train(), persons_of(case, run)
    found = model(*clips(case, run))
    share = torch.tensor(float(len(persons.boxes)))
    terms = set_losses(found, persons, share, case.meta["defaults_used"]["ACTION_WEIGHT"])
    total = mean_of_terms(terms)
    total.backward()
    missing = [name for name, one in model.named_parameters() if one.grad is None]
    assert not missing, f"without gradient, also where no box falls on a level: {missing}"
    first = [0, *persons.counts.cumsum(0).tolist()]
    matchings = [
        [
            torch.stack((one.proposals, one.persons - first[clip]))[:, one.clips == clip]
            for clip in range(len(first) - 1)
        ]
        for one in match_all(found.person_logits, found.boxes, persons)
    ]
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return terms | {"total": total}, gradients, matchings


def roi_align_of_the_goldens(features, boxes, images, size, scale, samples=0, aligned=False) -> Tensor:
    """RoIAlign from its definition, with gradients to the boxes.

    The goldens were made with such a stand-in: the gradient of the first boxes has a part that comes through their
    pooling. The real operator, and ours, give boxes none.
    """
    assert aligned and samples
    height, width = features.shape[2:]
    steps = (torch.arange(size * samples) + 0.5) / (size * samples)
    start, sides = boxes[:, :2] * scale - 0.5, (boxes[:, 2:] - boxes[:, :2]) * scale
    places = start[:, None] + steps[None, :, None] * sides[:, None]  # [N, samples, (x, y)]

    def weights(at: Tensor, length: int) -> Tensor:
        inside = ((at >= -1) & (at <= length)).float()
        at = at.clamp(0, length - 1)
        return (1 - (at[..., None] - torch.arange(length)).abs()).clamp(min=0) * inside[..., None]

    rows, columns = weights(places[..., 1], height), weights(places[..., 0], width)
    read = torch.einsum("nyh,nchw,nxw->ncyx", rows, features[images], columns)
    return F.avg_pool2d(read, samples)


def test_losses_matchings_and_gradients(case, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {run: trained(case, run)[1] for run in case.meta["runs"]}
    monkeypatch.setattr(localisation, "roi_align", roi_align_of_the_goldens)
    for run in case.meta["runs"]:
        compare_training(case, run, plain[run])


def compare_training(case, run: str, plain: dict[str, Tensor]) -> None:
    """Compare a step; `plain` are the gradients with our pooling, which gives boxes none."""
    prefix = f"{run}.train."
    expected = {name.removeprefix(prefix): one for name, one in case.tensors().items() if name.startswith(prefix)}
    tolerance = case.meta["tolerance"]
    terms, gradients, matchings = trained(case, run)
    found = {f"loss.{name}": value for name, value in terms.items()}
    found |= {f"grad.{name}": value for name, value in gradients.items()}
    found |= {
        f"match.rcnn{head}.img{clip}": one for head, clips in enumerate(matchings) for clip, one in enumerate(clips)
    }
    found["grad_norm_all"] = torch.stack([one.norm() for one in gradients.values()]).norm()
    assert set(expected) <= set(found), f"not computed: {sorted(set(expected) - set(found))}"
    assert {name for name in found if name.startswith(("loss", "match"))} <= set(expected)
    near = functools.partial(assert_close, atol=0)
    for name, one in expected.items():
        if name.startswith("match"):
            near(found[name], one, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        elif name.startswith("grad"):
            most = tolerance["grad_rtol"] * float(one.abs().max())
            assert_close(found[name], one, rtol=0, atol=most, msg=lambda text, name=name: f"{name}: {text}")
            if name not in ("grad.init_proposal_boxes.weight", "grad_norm_all"):
                assert_close(plain[name.removeprefix("grad.")], one, rtol=0, atol=most)
        else:
            near(found[name], one, rtol=tolerance["loss_rtol"], msg=lambda text, name=name: f"{name}: {text}")


def test_weights_are_all_used(case) -> None:
    run = next(iter(case.meta["runs"]))
    assert set(load_file(case.weights)) - {"criterion.empty_weight"} == set(build(case, run).state_dict())
