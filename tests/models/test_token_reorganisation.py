"""Token reorganisation beyond the official goldens: video models, scores, schedule, counts, pooling."""

import pytest
import torch
from torch.testing import assert_close

from finetune.adapters.attach import apply_tuning
from finetune.adapters.config import Tune
from pretrain.errors import RecipeError
from pretrain.models import token_scores
from pretrain.models.backbone import Prompts
from pretrain.models.classifier import Config, VideoClassifier, cost, layer_id
from pretrain.models.classifier_weights import load_pretrained
from pretrain.models.cubes import Grid, grid_of
from pretrain.models.image_vit import Config as ImageConfig
from pretrain.models.image_vit import ImageViT
from pretrain.models.keep_rates import Reorganisation, keep_rates, scheduled_rate, token_counts, tokens_kept
from pretrain.models.positions import stretch_class_table
from pretrain.models.token_scores import class_attention, received_attention
from pretrain.objectives.base import decays

TINY = {"size": "custom", "patch_size": 4, "dim": 24, "depth": 4, "heads": 3, "mlp_ratio": 2.0, "drop_path": 0.0}


def video_model(**tokens) -> VideoClassifier:
    """4x4x6 tokens, with weights large enough for attention to differ between tokens."""
    torch.manual_seed(0)
    model = VideoClassifier(Config(**TINY, classes=3, positions="rebuild", tokens=Reorganisation(**tokens)), 8, 16, 24)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.2)
    return model.eval()


def clips(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 8, 16, 24, 3, generator=torch.Generator().manual_seed(1))


def attention(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)


def test_scores_are_those_of_the_whole_attention_matrix(monkeypatch) -> None:
    monkeypatch.setattr(token_scores, "QUERY_CHUNK", 5)
    query, key = torch.randn(2, 3, 17, 8), torch.randn(2, 3, 17, 8)
    whole = attention(query, key)
    assert_close(class_attention(query, key, 8**-0.5), whole.mean(1)[:, 0])
    received = received_attention(query, key, 8**-0.5)
    assert_close(received, whole.mean((1, 2)))
    assert_close(received.sum(1), torch.ones(2))


def test_gradient_of_chunked_scores(monkeypatch) -> None:
    monkeypatch.setattr(token_scores, "QUERY_CHUNK", 5)
    weights, gradients = torch.randn(2, 17), []
    for score in (received_attention, lambda q, k, scale: attention(q, k).mean((1, 2))):
        generator = torch.Generator().manual_seed(0)
        query, key = (torch.randn(2, 3, 17, 8, generator=generator, requires_grad=True) for _ in range(2))
        (score(query, key, 8**-0.5) * weights).sum().backward()
        gradients.append((query.grad, key.grad))
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected)


def test_fused_token_is_the_weighted_sum() -> None:
    """One block by hand: attention on all tokens, then selection, then the MLP on what is left."""
    for fuse_norm in (False, True):
        model = video_model(keep_rate=0.5, blocks=[0], fuse_norm=fuse_norm)
        x, block = model.embed(clips()), model.blocks[0]
        query, key, _ = block.attn.project(block.norm1(x))
        score = attention(query, key).mean((1, 2))
        y = x + block.attn(block.norm1(x))
        tokens = []
        for sample in range(2):
            order = score[sample].argsort(descending=True)
            kept, dropped = order[:48], order[48:]
            weights = score[sample][dropped] / (score[sample][dropped].sum() if fuse_norm else 1)
            tokens.append(torch.cat((y[sample][kept], (weights[:, None] * y[sample][dropped]).sum(0)[None])))
        expected = torch.stack(tokens)
        expected = expected + block.mlp(block.norm2(expected))
        for later in model.blocks[1:]:
            expected = later(expected)
        assert_close(model.encode(clips()).x, expected, rtol=1e-4, atol=1e-5)


def test_rate_of_one_is_the_plain_model_bit_for_bit() -> None:
    plain, kept = video_model(), video_model(keep_rate=0.5)
    assert plain.reorganisation is None
    assert torch.equal(kept(clips(), keep_rate=1.0), plain(clips()))
    kept.reorganise(Reorganisation(keep_rate=1.0))
    assert kept.reorganisation is None and torch.equal(kept(clips()), plain(clips()))


def test_a_checkpoint_runs_at_any_rate() -> None:
    assert set(video_model(keep_rate=0.4).state_dict()) == set(video_model().state_dict())


@pytest.mark.parametrize("fuse", [True, False])
def test_origins_and_sizes_account_for_every_token(fuse: bool) -> None:
    model = video_model(keep_rate=0.6, fuse=fuse)
    tokens = model.encode(clips())
    assert tokens.x.shape[1] == token_counts(96, keep_rates(Reorganisation(0.6), 4), fuse)[-1]
    assert tokens.origin.shape == tokens.sizes.shape == tokens.x.shape[:2]
    for origin, sizes in zip(tokens.origin, tokens.sizes, strict=True):
        kept = origin[origin >= 0]
        assert len(kept.unique()) == len(kept)
        if fuse:
            assert sizes.sum() == 96 and (sizes[origin >= 0] == 1).all()
    assert [step.block for step in tokens.steps] == [1, 2, 3]


def test_size_weighted_mean_counts_fused_tokens() -> None:
    model = video_model(keep_rate=0.5, size_weighted=True)
    tokens = model.encode(clips())
    expected = (tokens.x * tokens.sizes[:, :, None]).sum(1) / 96
    assert_close(model.mean_tokens(tokens), expected)
    assert not torch.allclose(model.mean_tokens(tokens), tokens.x.mean(1))


@pytest.mark.parametrize("fuse", [True, False])
def test_stratified_keeps_every_moment_alike(fuse: bool) -> None:
    model = video_model(keep_rate=0.55, per_frame=True, fuse=fuse)
    tokens = model.encode(clips())
    counts = token_counts(96, keep_rates(Reorganisation(0.55), 4), fuse, slices=4)
    assert tokens.x.shape[1] == counts[-1] == 4 * 5 + fuse
    for origin in tokens.origin:
        moments = (origin[origin >= 0] // 24).bincount(minlength=4)
        assert (moments == 5).all()
    if fuse:
        assert (tokens.sizes.sum(1) == 96).all()


def test_permuted_tokens_keep_the_same_set() -> None:
    model = video_model(keep_rate=0.5)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    x = model.embed(clips())
    plain, permuted = model.run(x), model.run(x[:, order])
    kept = [set(row.tolist()) for row in plain.origin]
    assert kept == [{int(order[i]) if i >= 0 else -1 for i in row} for row in permuted.origin]
    assert_close(model.mean_tokens(permuted), model.mean_tokens(plain), rtol=1e-4, atol=1e-5)


def test_class_token_is_always_kept() -> None:
    torch.manual_seed(0)
    model = ImageViT(ImageConfig("image_vit", 16, 4, 24, 4, 3, 2.0, 5)).eval()
    plain = model(torch.randn(2, 3, 16, 16))
    model.reorganise(Reorganisation(keep_rate=0.1))
    assert (
        model.encode(torch.randn(2, 3, 16, 16)).x.shape[1]
        == 1 + token_counts(16, keep_rates(Reorganisation(0.1), 4), True)[-1]
    )
    assert model(torch.randn(2, 3, 16, 16)).shape == plain.shape


def test_class_score_needs_a_class_token() -> None:
    model = video_model(keep_rate=0.5)
    model.reorganisation.score = "class"
    with pytest.raises(RecipeError, match="class token"):
        model(clips())


def test_run_time_switches() -> None:
    model = video_model(keep_rate=0.5)
    assert model.encode(clips(), keep_rate=0.9).x.shape[1] == token_counts(96, [1, 0.9, 0.9, 0.9], True)[-1]
    model.reorganisation.rate = 0.9
    assert model.encode(clips()).x.shape[1] == token_counts(96, [1, 0.9, 0.9, 0.9], True)[-1]
    assert model.encode(clips(), counts=[None, None, 7, None]).steps[1].kept.shape[1] == 7
    with pytest.raises(RecipeError, match="can't keep 97"):
        model.encode(clips(), counts=[97, None, None, None])
    with pytest.raises(RecipeError, match="reorganise"):
        video_model()(clips(), keep_rate=0.5)


def test_schedule_of_the_paper() -> None:
    rates = {epoch: scheduled_rate(0.7, epoch * 5, 5, 10, 100) for epoch in (0, 9, 10, 60, 109, 110)}
    assert [rates[epoch] for epoch in (0, 9, 10, 110)] == [1, 1, 1, 0.7]
    assert_close(rates[60], 0.85)
    assert 0.7 < rates[109] < 0.701
    model = video_model(keep_rate=0.5, start_epoch=1, shrink_epochs=0)
    model.reorganisation.set_step(3, 4)
    assert model.encode(clips()).steps == []
    model.reorganisation.set_step(4, 4)
    assert len(model.encode(clips()).steps) == 3


@pytest.mark.parametrize(
    ("rate", "fused", "dropped"),
    [
        (0.9, (178, 162, 147), (177, 160, 144)),
        (0.8, (158, 128, 104), (157, 126, 101)),
        (0.7, (139, 99, 71), (138, 97, 68)),
        (0.6, (119, 73, 45), (118, 71, 43)),
        (0.5, (99, 51, 27), (98, 49, 25)),
    ],
)
def test_published_token_counts(rate: float, fused: tuple[int, ...], dropped: tuple[int, ...]) -> None:
    rates = keep_rates(Reorganisation(rate), 12)
    for fuse, expected in ((True, fused), (False, dropped)):
        counts = token_counts(196, rates, fuse)
        assert tuple(counts[index] for index in (3, 6, 9)) == expected
    assert tokens_kept(100, 0.55) == 56


@pytest.mark.parametrize(
    ("size", "costs"),
    [
        ("base", (178.5, 151.5, 129.3, 111.2, 96.5, 84.5)),
        ("large", (594.4, 502.7, 426.9, 365.1, 314.6, 273.2)),
        ("giant", (2539, 2144, 1817, 1551, 1332, 1153)),
    ],
)
def test_cost_table_of_video_models(size: str, costs: tuple[float, ...]) -> None:
    grid = grid_of(16, 224, 224, 2, 14 if size == "giant" else 16)
    for rate, expected in zip((1, 0.9, 0.8, 0.7, 0.6, 0.5), costs, strict=True):
        parts = cost(Config(size=size, tokens=Reorganisation(rate)), grid)
        assert abs((parts["attention"] + parts["MLP"]) / 1e9 - expected) < (1 if size == "giant" else 0.06)


def test_image_sizes_are_those_published() -> None:
    """DeiT's tiny, small and base."""
    for (dim, heads), count in {(192, 3): 5_717_416, (384, 6): 22_050_664, (768, 12): 86_567_656}.items():
        with torch.device("meta"):
            model = ImageViT(ImageConfig(dim=dim, heads=heads))
        assert sum(value.numel() for value in model.parameters()) == count


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep_rate": 0.0}, "keep_rate=0.0"),
        ({"keep_rate": 1.2}, "keep_rate=1.2"),
        ({"keep_rate": 0.5, "blocks": [1, 4]}, "blocks 0 to 3"),
        ({"keep_rate": 0.5, "fuse": False, "size_weighted": True}, "size_weighted"),
    ],
)
def test_impossible_options(options: dict, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        video_model(**options)


def test_prompts_and_dropping_exclude_each_other() -> None:
    model = video_model(keep_rate=0.5)
    model.embeddings = Prompts(1, 1, 24)
    with pytest.raises(RecipeError, match="exclude"):
        model(clips())


def test_images_of_other_sizes_stretch_their_positions() -> None:
    model = ImageViT(ImageConfig("image_vit", 16, 4, 24, 1, 3, 2.0, 0)).eval()
    assert model(torch.randn(1, 3, 24, 12)).shape == (1, 24)
    table = model.pos_embed[0]
    assert stretch_class_table(table, model.grid, Grid(1, 4, 4)) is table
    # Each position knows its row alone; stretched to 6 rows of 3, it must still be a row's.
    model.pos_embed.data[0, 1:] = torch.arange(4.0).repeat_interleave(4)[:, None]
    stretched = stretch_class_table(table, model.grid, Grid(1, 6, 3))
    assert stretched.shape == (19, 24) and torch.equal(stretched[0], table[0])
    rows = stretched[1:].unflatten(0, (6, 3))
    assert_close(rows, rows[:, :1].expand_as(rows))
    assert (rows[1:, 0] > rows[:-1, 0]).all()


@pytest.mark.parametrize(("weight", "fuse"), [(1.0, False), (4.0, True)])
def test_keyframe_stays_and_its_queries_count_more(weight: float, fuse: bool) -> None:
    """By hand, as systems/evad.md 2.2 says: 4 slices of 4 x 6 tokens, the middle one is number 2."""
    model = video_model(keep_rate=0.6, blocks=[0], score="keyframe", keyframe_weight=weight, fuse=fuse)
    tokens = model.encode(clips())
    kept = tokens_kept(96, 0.6)
    assert tokens.x.shape[1] == kept + fuse == token_counts(96, [0.6], fuse)[-1]
    middle = torch.arange(48, 72)
    assert (tokens.origin[:, :24] == middle).all()
    first, embedded = model.blocks[0], model.embed(clips())
    query, key, _ = first.attn.project(first.norm1(embedded))
    counts = torch.ones(96)
    counts[middle] = weight
    score = (attention(query, key) * counts[:, None]).mean((1, 2))
    score[:, middle] = -1
    expected = score.topk(kept - 24, dim=1).indices
    assert (tokens.origin[:, 24:kept] == expected).all()


def test_keyframe_stays_through_all_blocks() -> None:
    tokens = video_model(keep_rate=0.7, score="keyframe").encode(clips())
    assert all(set(range(48, 72)) <= set(row.tolist()) for row in tokens.origin)
    assert tokens.x.shape[1] == token_counts(96, [1, 0.7, 0.7, 0.7], True)[-1]
    with pytest.raises(RecipeError, match="leave none beside the keyframe's 24"):
        video_model(keep_rate=0.4, score="keyframe").encode(clips())


def added_class(**options) -> VideoClassifier:
    torch.manual_seed(0)
    tokens = Reorganisation(0.5, score="added_class")
    return VideoClassifier(Config(**TINY, classes=3, positions="rebuild", tokens=tokens, **options), 8, 16, 24)


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_added_class_token_ranks_and_classifies(pooling: str) -> None:
    model = added_class(pooling=pooling)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.2)
    assert model.reorganisation.score == "class" and model.embed(clips()).shape[1] == 97
    tokens = model.encode(clips())
    assert tokens.x.shape[1] == 1 + token_counts(96, keep_rates(Reorganisation(0.5), 4), True)[-1]
    model(clips()).sum().backward()
    token = model.added_class.cls_token
    assert token.grad.abs().sum() > 0
    pooled = model.fc_norm(tokens.x[:, 0] if pooling == "class" else tokens.x[:, 1:].mean(1))
    assert_close(model.forward_features(clips()), pooled)
    assert model.forward_features(clips(), pooled=False).shape[1] == tokens.x.shape[1] - 1


def test_added_class_token_starts_beside_pre_trained_weights(tmp_path) -> None:
    plain = video_model()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    model = added_class()
    report = load_pretrained(model, str(tmp_path / "plain.pth"))
    assert report.missing == ["added_class.cls_token"]
    assert apply_tuning(model, Tune("linear"))[0] == "added_class.cls_token"
    assert layer_id("added_class.cls_token", 4) == 0 and not decays("model.added_class.cls_token", (1, 1, 24))
    with pytest.raises(RecipeError, match="score=added_class"):
        VideoClassifier(Config(**TINY, classes=3, positions="rebuild", pooling="class"), 8, 16, 24)
    with pytest.raises(RecipeError, match="built without a class token"):
        plain.reorganise(Reorganisation(0.5, score="added_class"))


def test_explicit_counts_act_in_any_block_also_where_all_rates_are_one() -> None:
    dropping, resting = video_model(keep_rate=0.5, blocks=[1]), video_model()
    counts = [None, None, 20, 9]
    found = resting.encode(clips(), counts=counts)
    assert found.x.shape[1] == 10, "nine, and the fused one"
    # The same counts mean the same tokens, whatever the model's own rates are.
    assert torch.equal(found.x, dropping.encode(clips(), counts=counts, keep_rate=1.0).x)
    assert torch.equal(resting(clips()), dropping(clips(), keep_rate=1.0)), "and nothing is kept of them"
    with pytest.raises(RecipeError, match="block 2: can't keep 1000"):
        resting.encode(clips(), counts=[None, None, 1000, None])


def test_scales_and_biases_never_decay() -> None:
    assert decays("blocks.0.attn.qkv.weight", (6, 2)) and decays("blocks.0.scales", (6, 2))
    for name in ("blocks.0.attn.scale", "blocks.0.adaptmlp.scale", "a.bias", "model.pos_embed", "cls_token"):
        assert not decays(name, (3, 1, 1)), name
