"""Official TVTSv2: both towers, sorting head, losses and gradients; the H/14 form of the video tower; metrics."""

import re

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.metrics.retrieval import retrieval_scores
from pretrain.models.clip import ACTIVATIONS
from pretrain.models.tvtsv2 import Config, TVTSv2, VideoTower
from pretrain.models.tvtsv2_weights import load_tvtsv2, official_names, own_names
from pretrain.models.weights import LoadReport, load_state
from pretrain.objectives.tvtsv2 import compare_batch

KINDS = ("tvtsv2",)
#: The other tower in the file of weights.
OTHER = "H_"


def config_of(case, **changed) -> Config:
    given = case.meta["config"]
    assert given["img"] // given["patch"] * (given["img"] // given["patch"]) == case.meta["patches_per_frame"]
    facts = {
        "size": "custom", "image_size": given["img"], "patch_size": given["patch"], "dim": given["width"],
        "depth": given["layers"], "heads": given["heads"], "embedding": given["out"], "text_dim": given["twidth"],
        "text_depth": given["tlayers"], "text_heads": given["theads"], "activation": "quick_gelu",
        "context": given["ctx"], "vocabulary": given["vocab"], "frames": given["num_frames"],
        "segments": given["n_trans"], "sort_heads": given["sort_heads"],
    }  # fmt: skip
    return Config(**facts | changed)


def close(case, name: str, found: Tensor, gradient: bool = False) -> None:
    atol, rtol, steeper = (
        float(number) for number in re.findall(r"\d+e-\d+", case.meta["tolerance"])
    )
    wanted = case.tensors()[name]
    assert found.shape == wanted.shape, f"{name}: {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    torch.testing.assert_close(
        found.detach(), wanted, rtol=steeper if gradient else rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def build(case) -> TVTSv2:
    model = TVTSv2(config_of(case)).eval()
    state = {key: value for key, value in load_file(case.weights).items() if not key.startswith(OTHER)}
    load_tvtsv2(model, case.weights, {f"module.{key}": value for key, value in state.items()})
    back = official_names(model.state_dict())
    assert set(back) == set(state) and all(torch.equal(back[key], state[key]) for key in state)
    return model


def outputs(case, model: TVTSv2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the files name of a forward pass, and the losses."""
    given = case.tensors()
    clips, texts = given["video"].permute(0, 1, 3, 4, 2), case.meta["config"]["n_trans"]
    tokens = model.visual.forward_features(clips, visible=given["keep_ind"]).tokens
    seen = model.visual.sorted_by(tokens)
    every = model.text(given["text"])
    ours = every.unflatten(0, (texts, -1)).transpose(0, 1)  # rows of the file are clip-major
    order = model.sorting(seen, ours.detach())
    found = {"video_tokens": seen, "video_embeds": model.visual.forward_head(tokens), "text_embeds_all": every,
             "text_embeds": ours.mean(1), "pred_order": order}  # fmt: skip
    losses = compare_batch(found["video_embeds"], ours.mean(1), order)
    return found, {"loss": losses.total, "loss_contrast": losses.contrast, "loss_sort": losses.sorting["sort"]}


def test_tokens_embeddings_order_and_losses(case) -> None:
    found, losses = outputs(case, build(case))
    for name, value in (found | losses).items():
        close(case, name, value)
    sims = torch.nn.functional.cosine_similarity(found["video_embeds"][:, None], found["text_embeds"][None], dim=-1)
    close(case, "sim_v2t", sims)


def test_few_frames_without_a_mask_and_one_text(case) -> None:
    model, given = build(case), case.tensors()
    clips = given["video"].permute(0, 1, 3, 4, 2)[:, :2]
    close(case, "video_tokens_unmasked_T2", model.visual.sorted_by(model.visual.forward_features(clips).tokens))
    close(case, "single_text_embeds", model.text(given["text"][: len(clips)]))


def test_gradients(case) -> None:
    wanted = [name for name in case.tensors() if "grad_" in name]
    for part, loss in (("grad_", "loss"), ("sortonly_grad_", "loss_sort")):
        model = build(case)
        outputs(case, model)[1][loss].backward()
        # What the loss does not reach has no gradient at all.
        reached = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        found = official_names(reached)
        assert ("text_projection" in found) == (part == "grad_")
        for name in wanted:
            if name.startswith(part):
                close(case, name, found[name.removeprefix(part)], gradient=True)
    assert len(wanted) == 7


def test_the_other_form_of_the_video_tower(case) -> None:
    tower = VideoTower(config_of(case, activation="gelu", tokens="plain")).eval()
    weights = {key.removeprefix(OTHER): value for key, value in load_file(case.weights).items() if OTHER in key}
    state = {key.removeprefix("visual."): value for key, value in own_names(weights).items()}
    load_state(tower, state, LoadReport(case.weights, "official"))
    given = case.tensors()
    tokens = tower.forward_features(given["video"].permute(0, 1, 3, 4, 2), visible=given["H_keep_ind"]).tokens
    close(case, "H_pooled", tower.forward_head(tokens))
    close(case, "H_tokens", tower.sorted_by(tokens))
    assert set(ACTIVATIONS) == {"quick_gelu", "gelu"}


@pytest.mark.parametrize("tied", ["", "_tied"])
def test_retrieval(case, tied: str) -> None:
    sims = case.tensors()[f"ret_sims{tied}"]
    for name, ties, matrix in (("t2v", "best", sims), ("v2t", "mean", sims.t())):
        found = retrieval_scores(matrix, torch.arange(len(sims)), ties)
        wanted = case.meta["retrieval_metrics"][name + tied]
        assert wanted["R1"] == pytest.approx(found.recall[1])
        assert wanted["MedR"] == pytest.approx(found.median_rank)
        assert wanted["MeanR"] == pytest.approx(found.mean_rank)
        assert wanted["geometric_mean_R1-R5-R10"] == pytest.approx(found.geometric_mean)
        assert all(wanted[f"R{at}"] == pytest.approx(found.recall[at]) for at in (5, 10, 50))
