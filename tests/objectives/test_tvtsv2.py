"""TVTSv2: start from a CLIP, what is trained, both losses, gradients across ranks, measures, runs, export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.engine.optimiser import parameter_groups
from pretrain.errors import DataError, RecipeError, WeightsError
from pretrain.models import clip
from pretrain.models.clip_weights import open_clip_names
from pretrain.models.tvtsv2 import Config, TimeTable, VideoTower
from pretrain.objectives.base import method_of, problems_of, warnings_of
from pretrain.objectives.tvtsv2 import TVTSv2Objective, compare_batch
from pretrain.objectives.tvtsv2_evaluation import class_numbers, listed_classes
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Recipe
from pretrain.runtime.process_group import Ranks
from pretrain.trained.load_run import load_trained
from tests.narrated_films import make_films
from tests.toy_run import ROOT, train

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_films(tmp_path_factory.mktemp("tvtsv2"))


def recipe_of(path: Path, *words: str) -> Recipe:
    return load_recipe(str(path), list(words))


def build(path: Path, *words: str) -> TVTSv2Objective:
    torch.manual_seed(1)
    objective = method_of(recipe_of(path, *words)).build()
    assert isinstance(objective, TVTSv2Objective)
    return objective


def clip_of(recipe: Recipe, seed: int = 3) -> clip.CLIP:
    """A CLIP of the recipe's sizes, with biases that are not zero."""
    names = [field for field in clip.Config.__dataclass_fields__ if field != "name"]
    torch.manual_seed(seed)
    model = clip.CLIP(clip.Config(**{name: getattr(recipe.model, name) for name in names})).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    return model


def batch_of(objective: TVTSv2Objective, path: Path, rows: int = 4, texts: int = 4) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 14, (rows, texts, 8), generator=draw)
    ids[..., 0], ids[..., 5:] = 2, 15
    video = torch.randint(0, 255, (rows, 8, 32, 32, 3), generator=draw, dtype=torch.uint8)
    visible = torch.rand(rows, 16, generator=draw).argsort(1)[:, :8]
    return {"video": video, "ids": ids, "visible": visible, "cut": torch.zeros(rows, dtype=torch.int64)}


@pytest.mark.parametrize("layout", ["own", "open_clip"])
def test_a_fresh_start_answers_as_its_clip(path: Path, layout: str) -> None:
    """To single frames: attention over time adds nothing yet."""
    objective = build(path).eval()
    source = clip_of(recipe_of(path))
    state = source.state_dict() if layout == "own" else open_clip_names(source.state_dict())
    objective.load_pretrained("clip.pth", state)
    with torch.no_grad():
        objective.model.visual.times.table.zero_()
        images = torch.randn(3, 3, 32, 32)
        torch.testing.assert_close(objective.model.visual(images), source.visual(images), rtol=1e-5, atol=1e-5)
        ids = batch_of(objective, path)["ids"][:, 0]
        torch.testing.assert_close(objective.model.text(ids), source.text(ids), rtol=1e-6, atol=1e-6)


def test_an_incomplete_clip_is_refused_and_nothing_loaded(path: Path) -> None:
    objective = build(path)
    state = clip_of(recipe_of(path)).state_dict()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    for missing in ("text.blocks.1.mlp.fc1.bias", "text.embed.positions"):
        with pytest.raises(WeightsError, match=missing.removeprefix("text.")):
            objective.load_pretrained("clip.pth", {name: value for name, value in state.items() if name != missing})
    with pytest.raises(WeightsError, match="missing: "):
        objective.load_pretrained("image.pth", {name: value for name, value in state.items() if "text." not in name})
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())


def test_frames_beyond_the_table_stretch_it(path: Path) -> None:
    table = TimeTable(4, 3)
    with torch.no_grad():
        table.table.copy_(torch.arange(4.0)[:, None].expand(-1, 3))
        blank = torch.zeros(1, 8, 2, 3)
        assert torch.equal(table(blank[:, :2])[0, :, 0, 0], torch.tensor([0.0, 1.0]))
        assert table(blank)[0, :, 1, 2].tolist() == pytest.approx([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    assert table(blank).requires_grad


def test_order_of_kept_patches_changes_nothing(path: Path) -> None:
    tower = build(path).model.visual.eval()
    with torch.no_grad():
        for block in tower.blocks:
            torch.nn.init.normal_(block.timeattn.qkv.weight, std=0.1)
        video, visible = torch.randn(2, 4, 32, 32, 3), torch.rand(2, 16).argsort(1)[:, :6]
        first, second = tower(video, visible), tower(video, visible.flip(1))
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
        assert (tower(video) - first).abs().max() > 1e-3
        assert (tower(video.flip(1), visible) - first).abs().max() > 1e-3, "blind to the order of frames"


def test_texts_permute_their_logits(path: Path) -> None:
    head = build(path).model.sorting.eval()
    with torch.no_grad():
        torch.nn.init.normal_(head.type_embed)
        video, texts, order = torch.randn(2, 9, 24), torch.randn(2, 4, 24), torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(head(video, texts[:, order]), head(video, texts)[:, order], rtol=1e-4, atol=1e-5)


def test_what_is_trained_and_how(path: Path) -> None:
    objective = build(path)
    names = {id(value): name.removeprefix("model.") for name, value in objective.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in parameter_groups(objective, 0.05):
        found |= {names[id(value)]: (group["lr_scale"], group["weight_decay"]) for value in group["params"]}
    frozen = set(names.values()) - set(found)
    blocks = tuple(f"text.blocks.{index}." for index in range(3))
    assert frozen == {name for name in names.values() if name.startswith(blocks)}
    new = {name for name, (scale, _) in found.items() if scale == 1}
    assert new == {name for name in found if "timeattn" in name or "norm3" in name or name.startswith("sorting.")}
    assert found["visual.times.table"] == (1e-3, 0.05) == found["visual.embed.class_token"]
    assert found["sorting.type_embed"] == (1, 0.05) and found["visual.norm_pre.weight"] == (1e-3, 0)
    assert found["sorting.norm.weight"] == (1, 0) and found["text.blocks.3.attn.qkv.bias"] == (1e-3, 0)
    assert {"text.embed.tokens.weight", "text.embed.positions", "text.norm.weight", "text.head.weight"} <= set(found)
    none = build(path, "objective.tune_text_blocks=0").model.text.blocks
    assert not any(value.requires_grad for value in none.parameters())


def test_a_step_moves_all_but_the_frozen_blocks(path: Path) -> None:
    objective = build(path, "objective.clip_lr_scale=1").train()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    optimiser = torch.optim.AdamW(parameter_groups(objective, 0.05), lr=1e-3)
    for texts in (4, 1, 4):
        optimiser.zero_grad()
        output = objective(batch_of(objective, path, texts=texts))
        output.loss.backward()
        # Also of clips with one text: ZeRO stage 3 would keep an older gradient where there is none.
        assert all(value.grad is not None for value in objective.parameters() if value.requires_grad)
        moved = objective.model.sorting.head.weight.grad.abs().sum() > 0
        assert bool(moved) == (texts == 4) == ("sort" in output.metrics)
        optimiser.step()
    for name, value in objective.state_dict().items():
        frozen = any(name.startswith(f"model.text.blocks.{index}.") for index in range(3))
        assert torch.equal(value, before[name]) == frozen, name


def test_losses_by_hand() -> None:
    video, text = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [5.0, 5.0]])
    order = torch.full((2, 3, 3), 0.0)
    order[0] = torch.eye(3) * 4
    order[1, :, 0] = 4
    found = compare_batch(video, text, order, temperature=0.1, sort_weight=2)
    cosines = torch.tensor([[0.8, 1.4 / 2**0.5], [0.0, 1 / 2**0.5]]) / 0.1
    places = torch.arange(2)
    contrast = F.cross_entropy(cosines, places) + F.cross_entropy(cosines.t(), places)
    assert float(found.contrast) == pytest.approx(float(contrast), rel=1e-5)
    sort = 2 * F.cross_entropy(order.flatten(0, 1), torch.arange(3).repeat(2))
    assert float(found.sorting["sort"]) == pytest.approx(float(sort))
    assert float(found.total) == pytest.approx(float(contrast + sort), rel=1e-5)
    assert float(found.sorting["placed"]) == pytest.approx(4 / 6) and float(found.sorting["sorted"]) == 0.5
    single = compare_batch(video, text, order[:, :1], temperature=0.1)
    assert single.sorting == {} and torch.equal(single.total, single.contrast)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["objective.mask_ratio=1"], "objective.mask_ratio: found 1"),
        (["objective.mask_ratio=0.97"], "hides all patches"),
        (["objective.temperature=0"], "objective.temperature"),
        (["objective.clip_lr_scale=0"], "objective.clip_lr_scale"),
        (["objective.tune_text_blocks=5"], "objective.tune_text_blocks: found 5, allowed: 0 to 4"),
        (["input.segments=3"], "input.segments: found 3, allowed: 4"),
        (["input.context=9"], "input.context: found 9, allowed: 8"),
        (["model.vocabulary=15"], "16 ids, the text tower has model.vocabulary=15"),
        (["model.end_id=3"], "model.end_id: found 3, allowed: 15"),
        (["input.narrated=[movies]"], "input.narrated: found movies, allowed: names of data.sources (films, clips)"),
        (["data.compose=mixed"], "data.compose: found mixed, allowed: alternate"),
        (["model.sort_heads=5"], "model.sort_heads=5"),
        (["model.embedding=null"], "model.embedding: null"),
        (["model.frames=0"], "model.frames: found 0"),
        (["input.height=36"], "input.height: found 36, allowed: a multiple of model.patch_size=8"),
        (["objective.held_out.measure=recognition", "objective.held_out.shards=x"], "objective.held_out.class_names"),
        (["objective.held_out.micro=0"], "objective.held_out.micro: found 0"),
    ],
)
def test_what_can_not_work_is_refused(path: Path, words: list[str], expected: str) -> None:
    found = problems_of(method_of(recipe_of(path, *words)))
    assert any(expected in line for line in found), found


def test_warnings_and_other_inputs(path: Path, tmp_path: Path) -> None:
    assert problems_of(method_of(recipe_of(path))) == []
    (line,) = warnings_of(method_of(recipe_of(path)))
    assert "starts from a CLIP" in line
    lines = warnings_of(method_of(recipe_of(path, "input.narrated=[]", "data.compose=mixed", "run.init_weights=x")))
    assert len(lines) == 1 and "nothing is sorted" in lines[0]
    with pytest.raises(RecipeError, match="prompts"):
        tower = VideoTower(Config(**vars(recipe_of(path).model)))
        tower.embeddings = torch.nn.Identity()  # type: ignore[assignment]
        tower(torch.zeros(1, 3, 32, 32))


def measured(path: Path, objective: TVTSv2Objective, measure: str, source: str, *words: str) -> dict[str, float]:
    held_out = (f"shards={path.parent / source}", f"measure={measure}", *words)
    evaluation = method_of(recipe_of(path, *(f"objective.held_out.{word}" for word in held_out))).evaluation(ALONE)
    found = evaluation(objective.eval())
    assert evaluation.best_by in found
    return found


def test_measures_on_held_out_videos(path: Path, tmp_path: Path) -> None:
    objective = build(path)
    found = measured(path, objective, "sorting", "films", "micro=5")
    assert found["videos"] == 24 and {"placed", "sorted", "t2v_R@1", "v2t_R@10"} <= set(found)
    # All films have the same texts in another order, hence the same mean: as many ties as films, which help texts only.
    assert found["t2v_R@1"] < 100
    assert measured(path, objective, "sorting", "films", "micro=24") == pytest.approx(found, rel=1e-4)
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\nwhite\n")
    (tmp_path / "label2id.json").write_text('{"white": 0, "blue": 1, "green": 2, "red": 3}')
    files = [f"class_names={tmp_path / name}" for name in ("names.txt", "label2id.json")]
    scores = [measured(path, objective, "recognition", "clips", file) for file in files]
    assert scores[0] == pytest.approx(scores[1]) and 0 <= scores[0]["top1"] < scores[0]["top5"] == 100
    switch = [f"dual_softmax={word}" for word in ("false", "true")]
    plain, dual = (measured(path, objective, "retrieval", "clips", word) for word in switch)
    assert plain["videos"] == 16 and plain != dual


def test_recognition_is_right_where_clips_say_their_class(path: Path, tmp_path: Path) -> None:
    """With embeddings put in by hand: each clip's is that of its class' sentence."""
    objective = build(path).eval()
    names = ["red", "green", "blue", "white"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    samples = method_of(recipe_of(path)).samples()
    with torch.no_grad():
        sentences = objective.model.text(samples.captions([f"a person {name}" for name in names]))

    def features(batch: dict[str, Tensor]) -> Tensor:
        means = batch["video"].float().mean((1, 2, 3))
        dominant = torch.where(means.min(1).values > means.max(1).values / 2, 3, means.argmax(1))
        return sentences[dominant]

    objective.features = features  # type: ignore[method-assign]
    found = measured(path, objective, "recognition", "clips", f"class_names={tmp_path / 'names.txt'}")
    assert found["top1"] == 100


def test_classes_and_labels(tmp_path: Path) -> None:
    assert class_numbers(["Brush_Hair", "1", "cart wheel"], ["brush hair", "cart wheel"], "x") == [0, 1, 1]
    for wrong in (["hand stand"], ["2"], ["-1"]):
        with pytest.raises(DataError, match="is no class|are no class"):
            class_numbers(wrong, ["a", "b"], "x")
    (tmp_path / "list.json").write_text("[1]")
    for name in ("list.json", "none.json", None):
        with pytest.raises(DataError, match="class_names"):
            listed_classes(None if name is None else str(tmp_path / name))


def test_a_run_from_a_clip_to_export(path: Path, tmp_path: Path) -> None:
    """As a user does: starts from a CLIP's file, trains on both sources in turn, measures, exports, goes on."""
    source = clip_of(recipe_of(path))
    torch.save(open_clip_names(source.state_dict()), tmp_path / "clip.pt")
    words = [f"run.init_weights={tmp_path / 'clip.pt'}", "schedule.epochs=1", "batch.micro=8",
             f"objective.held_out.shards={path.parent / 'films'}", "objective.held_out.measure=sorting"]  # fmt: skip
    run = tmp_path / "run"
    train([ROOT / "launch" / "pretrain.py", "--recipe", path, f"run.dir={run}", *words], 1, tmp_path)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sorts = ["train/sort" in record for record in records if "train/loss" in record]
    assert sorts == [True, False] * 3, "a step of each source in turn"
    assert any("eval/placed" in record for record in records)
    assert '"metric": "placed"' in (run / "best.json").read_text()
    trained = load_trained(run)
    state = trained.objective.model.state_dict()
    assert torch.equal(state["text.blocks.0.mlp.fc1.weight"], source.text.blocks[0].mlp.fc1.weight)
    assert not torch.equal(state["text.blocks.3.mlp.fc1.weight"], source.text.blocks[3].mlp.fc1.weight)
    exports = trained.method.exports(trained.source)
    exports["safetensors"].write(trained.objective, str(tmp_path / "out"))
    again = load_trained(tmp_path / "out").objective.model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert "sorting head" in exports["official"].write(trained.objective, str(tmp_path / "out.pth"))
    fresh = build(path)
    fresh.load_pretrained("out.pth", torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"])
    found = fresh.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in state.items() if "sorting" not in name)
    assert not torch.equal(state["sorting.head.weight"], found["sorting.head.weight"])


@pytest.mark.faults
def test_two_ranks_stopped_and_resumed_are_the_same_run(path: Path, tmp_path: Path) -> None:
    """Bit for bit on two ranks, and nearly so on one; both sources' turns go on where they were."""
    driver = ROOT / "tests" / "extensions" / "driver.py"

    def drive(ranks: int, *runs: tuple[str, ...]) -> list[list[float]]:
        plan = [
            {"program": "pretrain", "recipe": str(path), "planned": False,
             "overrides": [f"run.dir={tmp_path / name}", "objective.clip_lr_scale=0.1", *words]}
            for name, *words in runs
        ]  # fmt: skip
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        train([driver, tmp_path / "plan.json"], ranks, ROOT, timeout_s=400)
        lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name, *_ in runs]
        return [[json.loads(line)["train/loss"] for line in some] for some in lines]

    words = ("schedule.epochs=1", "checkpoint.every_steps=3")
    half, gradient = "schedule.max_steps=3", "objective.contrastive_grad=official"
    whole, _, official = drive(2, ("whole", *words), ("halves", *words, half), ("official", *words, gradient))
    (resumed,) = drive(2, ("halves", *words))
    (alone,) = drive(1, ("alone", *words))
    assert len(whole) == 6 and resumed == whole
    # An update of either source lies behind three steps; later ones differ by what Adam makes of roundings.
    assert alone[:3] == pytest.approx(whole[:3], rel=2e-4) and alone == pytest.approx(whole, rel=1e-2)
    assert official[0] == whole[0] and official[1:] != whole[1:], "half of the contrast's gradient"
