"""Methods of tuning: what they train, how they start, what merging and prompts do."""

import re

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from finetune.adapters.attach import apply_tuning, detach, merge
from finetune.adapters.config import AdaptFormer, LowRank, Prompts, Tune
from finetune.adapters.modules import AdaptMLP
from finetune.recipe import load_tune_recipe
from pretrain.errors import RecipeError
from pretrain.models.classifier import Config, VideoClassifier
from pretrain.models.image_vit import Config as ImageConfig
from pretrain.models.image_vit import ImageViT
from pretrain.objectives.base import problems_of
from tests.plain_classifier import PlainClassifier, PlainTask

TUNES = {
    "linear": Tune("linear"),
    "adaptformer": Tune("adaptformer", adaptformer=AdaptFormer(4)),
    "vpt": Tune("vpt", vpt=Prompts(2)),
    "vpt shallow": Tune("vpt", vpt=Prompts(2, "shallow")),
    "lora": Tune("lora", lora=LowRank(2, targets=["query", "value", "proj", "fc1"])),
    "bitfit": Tune("bitfit"),
}

#: Trainable and total parameters of ViT-B (systems/adaptformer.md section 3.8).
PUBLISHED = [
    (Tune("linear"), 174, 135_342, 86_361_006),
    (Tune("linear"), 51, 40_755, None),
    (Tune("vpt"), 174, 144_558, 86_370_222),
    (Tune("vpt"), 51, 49_971, None),
    (Tune("adaptformer", adaptformer=AdaptFormer(1)), 174, 163_002, 86_388_666),
    (Tune("adaptformer", adaptformer=AdaptFormer(4)), 174, 218_334, 86_443_998),
    (Tune("adaptformer", adaptformer=AdaptFormer(64)), 174, 1_324_974, 87_550_638),
    (Tune("adaptformer", adaptformer=AdaptFormer(64)), 51, 1_230_387, None),
]
PUBLISHED_IMAGE = [
    (Tune("linear"), 76_900),
    (Tune("vpt"), 86_116),
    (Tune("adaptformer", adaptformer=AdaptFormer(1)), 104_560),
    (Tune("adaptformer", adaptformer=AdaptFormer(4)), 159_892),
    (Tune("adaptformer", adaptformer=AdaptFormer(64)), 1_266_532),
]


def count(model: torch.nn.Module, trainable: bool) -> int:
    return sum(value.numel() for value in model.parameters() if value.requires_grad or not trainable)


@pytest.mark.parametrize(("tune", "classes", "trainable", "total"), PUBLISHED)
def test_published_counts_of_video(tune: Tune, classes: int, trainable: int, total: int | None) -> None:
    with torch.device("meta"):
        model = VideoClassifier(Config(classes=classes, head="batch_norm"), 8, 224, 224)
        apply_tuning(model, tune)
    assert count(model, trainable=True) == trainable
    assert total in (None, count(model, trainable=False))


@pytest.mark.parametrize(("tune", "trainable"), PUBLISHED_IMAGE)
def test_published_counts_of_images(tune: Tune, trainable: int) -> None:
    with torch.device("meta"):
        model = ImageViT(ImageConfig(dim=768, heads=12, classes=100, head="batch_norm"))
        apply_tuning(model, tune)
    assert count(model, trainable=True) == trainable


def test_giant_adapter_count() -> None:
    with torch.device("meta"):
        model = VideoClassifier(Config(size="giant", classes=0), 16, 224, 224)
        apply_tuning(model, Tune("adaptformer"))
    assert count(model, trainable=True) - 2 * 1408 == 7_267_840


@pytest.mark.parametrize("name", TUNES)
def test_gradients_reach_exactly_what_is_trained(make, example, name: str) -> None:
    model = make()
    names = apply_tuning(model, TUNES[name])
    assert names == [key for key, value in model.named_parameters() if value.requires_grad]
    for _ in range(2):  # zero-started parts pass no gradient on in the first step
        model.zero_grad()
        F.cross_entropy(model(example(model)), torch.tensor([0, 1, 2, 0])).backward()
        with torch.no_grad():
            for key in names:
                model.get_parameter(key).add_(model.get_parameter(key).grad, alpha=-0.1)
    reached = {key for key, value in model.named_parameters() if value.grad is not None and value.grad.any()}

    assert reached >= set(names) - {"fc_norm.bias"}  # batch norm takes a common shift away
    assert reached <= set(names)


@pytest.mark.parametrize("name", ["adaptformer", "lora", "bitfit", "linear"])
def test_starts_as_the_frozen_model(make, example, name: str) -> None:
    model = make().eval()
    before = model(example(model))
    apply_tuning(model, TUNES[name])
    assert torch.equal(model(example(model)), before)


def test_released_start_is_another_function(make, example) -> None:
    model = make().eval()
    before = model(example(model))
    apply_tuning(model, Tune("adaptformer", adaptformer=AdaptFormer(4, init="released")))
    assert not torch.allclose(model(example(model)), before)
    assert 0.015 < model.blocks[0].adaptmlp.up_proj.weight.std() < 0.025


@pytest.mark.parametrize("form", ["deep", "shallow"])
def test_prompts_change_results_but_not_lengths(make, example, form: str) -> None:
    model = make().eval()
    before = model.forward_features(example(model), pooled=False)
    apply_tuning(model, Tune("vpt", vpt=Prompts(3, form)))
    after = model.forward_features(example(model), pooled=False)
    assert after.shape == before.shape and not torch.allclose(after, before)
    detach(model)
    assert torch.equal(model.forward_features(example(model), pooled=False), before)


def test_prompts_of_a_block_leave_with_it(make, example) -> None:
    """Deep prompts of the first block see the input, those of the last see what came out of it: order matters."""
    model = make().eval()
    apply_tuning(model, Tune("vpt", vpt=Prompts(2)))
    before = model(example(model))
    first, last = (model.embeddings.get_parameter(str(index)) for index in (0, 1))
    with torch.no_grad():
        first.data, last.data = last.data.clone(), first.data.clone()
    assert not torch.allclose(model(example(model)), before)


@pytest.mark.parametrize("name", TUNES)
def test_what_has_no_place_in_a_model_is_refused(name: str) -> None:
    tune, model = TUNES[name], PlainClassifier()
    found = problems_of(PlainTask(load_tune_recipe("demo_finetune", [f"tune.method={tune.method}"])))
    if tune.method in ("linear", "bitfit"):
        assert found == [] and set(apply_tuning(model, tune)) >= {"head.weight", "head.bias"}
        return
    message = f"tune.method={tune.method}: needs the blocks of a ViT .*, found PlainClassifier"
    assert len(found) == 1 and re.match(message, found[0])
    with pytest.raises(RecipeError, match=message):
        apply_tuning(model, tune)


def test_a_method_that_would_train_nothing_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"tune.method=linear: Linear has no parameter that it trains .*head\."
    ) as told:
        apply_tuning(torch.nn.Linear(3, 2), Tune("linear"))
    assert "allowed here: full" in str(told.value)
    assert apply_tuning(torch.nn.Linear(3, 2), Tune("bitfit")) == ["bias"]


def test_bottleneck_forms_and_norms() -> None:
    x, changed = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    for norm in ("none", "in", "out"):
        for learned in ("none", "scalar", "channel"):
            options = AdaptFormer(3, "parallel", norm, 0.3, learned, init="released")
            parallel, sequential = (
                AdaptMLP(8, options),
                AdaptMLP(8, AdaptFormer(**{**vars(options), "form": "sequential"})),
            )
            sequential.load_state_dict(parallel.state_dict())
            assert_close(parallel(x, changed) - changed, parallel.bottleneck(x), rtol=1e-4, atol=1e-5)
            assert_close(sequential(x, changed), changed + parallel.bottleneck(changed))
            assert (parallel.adapter_layer_norm_before is None) == (norm == "none")
    hidden = torch.relu(x @ parallel.down_proj.weight.T) @ parallel.up_proj.weight.T
    assert_close(parallel.bottleneck(x), F.layer_norm(hidden, (8,), eps=1e-5))


def test_merged_update_is_the_same_function(make, example) -> None:
    model = make().eval()
    apply_tuning(model, TUNES["lora"])
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".update." in name:
                value.normal_(std=0.2)
    keys = set(make().state_dict())
    tuned = model(example(model))
    assert not torch.allclose(tuned, make().eval()(example(model)), atol=1e-3)
    merge(model)
    assert set(model.state_dict()) == keys
    assert_close(model(example(model)), tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "adaptformer", "vpt"])
def test_what_can_not_be_merged_is_refused(make, name: str) -> None:
    model = make()
    apply_tuning(model, TUNES[name])
    with pytest.raises(RecipeError, match="low-rank"):
        merge(model)


def test_wrong_options_are_listed_together(make) -> None:
    tune = Tune("lora", AdaptFormer(0), Prompts(0), LowRank(0, dropout=1.0, targets=["querry"]))
    with pytest.raises(RecipeError) as caught:
        apply_tuning(make(), tune)
    assert len(caught.value.problems) == 5 and "query" in str(caught.value)


def test_a_second_adapter_is_refused(make) -> None:
    model = make()
    apply_tuning(model, TUNES["adaptformer"])
    with pytest.raises(RecipeError, match="already"):
        apply_tuning(model, TUNES["vpt"])


@pytest.mark.parametrize("name", ["adaptformer", "vpt", "lora"])
def test_activation_checkpointing_with_a_frozen_backbone(make, example, name: str) -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(3)
        model = make()
        model.activation_checkpointing = recompute
        names = apply_tuning(model, TUNES[name])
        F.cross_entropy(model(example(model)), torch.tensor([0, 1, 2, 0])).backward()
        gradients.append([model.get_parameter(key).grad for key in names])
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(recomputed, plain)
