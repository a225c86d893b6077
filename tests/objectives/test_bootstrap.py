"""Bootstrapping: what is compared, what is trained, what is refused, and the comparison on held-out pictures."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.checkpoint.consolidate import consolidated_state
from pretrain.commands.zero_shot import main
from pretrain.data.members import Members
from pretrain.data.samples import Place, SourceInfo
from pretrain.engine.optimiser import parameter_groups
from pretrain.errors import DataError
from pretrain.models import initial_weights
from pretrain.models.alignment_teacher import facts_of, frozen_teacher, tower_maker
from pretrain.models.clip import CLIP as CLIPModel
from pretrain.models.clip import VisualTower
from pretrain.models.sparseformer.inheritance import PARTS
from pretrain.objectives.base import method_of, problems_of, warnings_of
from pretrain.objectives.bootstrap import BootstrapObjective, alignment, pooled_patches
from pretrain.objectives.bootstrap_evaluation import BootstrapEvaluation
from pretrain.plan.trace import trace_step
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Recipe, Source
from pretrain.runtime.process_group import Ranks
from pretrain.samples.shared_crop import SECOND, Config, SharedCrops
from pretrain.samples.text import Tokenizer
from pretrain.trained.load_run import load_trained
from pretrain.trained.visual_tower import visual_tower
from tests.toy_run import ROOT, train

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
RECIPE = """\
model: {name: sparseformer, size: custom, form: bootstrapped, tokens: 5, focus_dim: 64, dim: 128, depth: 2, repeats: 2,
        points: 4, channels: 8, classes: 3, norm_eps: 1e-6}
objective:
  name: bootstrap
  tune_blocks: 1
  teacher:
    weights: FOLDER/teacher.pth
    dtype: fp32
    arguments: [embed_dim=128, depth=3, num_heads=2, img_size=48]
input: {name: shared_crop, height: 32, width: 32, second_size: 48}
data:
  sources: {toy: {shards: SHARDS}}
  lanes: 4
  shuffle_window: 4
  workers: 0
batch: {samples: 8, micro: 4}
optim: {base_lr: 1e-3, base_batch: 8, clip_grad: 1.0, betas: [0.9, 0.999]}
schedule: {epochs: 2, warmup_epochs: 0.4}
compute: {dtype: fp32}
zero: {stage: 0}
checkpoint: {every_steps: 4, keep_last: 2}
log: {every_steps: 1, pictures_every_steps: 0, wandb: disabled, peak_tflops: 0.1}
run: {init_weights: "${objective.teacher.weights}"}
"""
CLIP = [f"objective.teacher.clip.{word}" for word in (
    "size=custom", "image_size=48", "patch_size=16", "dim=128", "depth=3", "heads=2", "embedding=3", "text_dim=64",
    "text_depth=1", "text_heads=1", "activation=quick_gelu",
)] + ["objective.teacher.kind=clip", "model.head_bias=false", "model.activation=quick_gelu"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe, and a teacher with random weights."""
    where = tmp_path_factory.mktemp("bootstrap")
    path = where / "bootstrap.yaml"
    path.write_text(RECIPE.replace("FOLDER", str(where)).replace("SHARDS", str(toy.folder / "shards")))
    torch.manual_seed(0)
    recipe = load_recipe(str(path))
    teacher = tower_maker(recipe.objective.teacher, 3)()
    with torch.no_grad():
        for value in teacher.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    torch.save(teacher.vit.state_dict(), where / "teacher.pth")
    return where


def recipe_of(folder: Path, *words: str) -> Recipe:
    return load_recipe(str(folder / "bootstrap.yaml"), list(words))


def build(recipe: Recipe) -> BootstrapObjective:
    torch.manual_seed(1)
    objective = method_of(recipe).build()
    assert isinstance(objective, BootstrapObjective)
    return objective


def inheriting(folder: Path, *words: str) -> BootstrapObjective:
    objective = build(recipe_of(folder, *words))
    objective.load_pretrained("teacher.pth", torch.load(folder / "teacher.pth", weights_only=True))
    return objective


def batch_of(rows: int = 4, sizes: tuple[int, ...] = (32, 48)) -> dict[str, Tensor]:
    """Smooth pictures at both sizes, the same ones."""
    ground = torch.rand(rows, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    found = [F.interpolate(ground, (size, size), mode="bilinear").permute(0, 2, 3, 1)[:, None] for size in sizes]
    return dict(zip(("video", SECOND), [(one * 255).to(torch.uint8) for one in found], strict=False))


def test_losses() -> None:
    student, teacher = torch.tensor([[3.0, 4.0, 0.0]]), torch.tensor([[4.0, 3.0, 0.0]])
    assert float(alignment(student, teacher, "cosine")) == pytest.approx(1 - 24 / 25)
    assert float(alignment(student, teacher, "mse")) == pytest.approx(2 / 3)
    correlation = np.corrcoef(student[0], teacher[0])[0, 1]
    assert float(alignment(student, teacher, "ln_mse")) == pytest.approx(2 * (1 - correlation), abs=1e-4)
    for loss in ("cosine", "ln_mse"):
        assert float(alignment(student * 7, teacher, loss)) == pytest.approx(
            float(alignment(student, teacher, loss)), abs=1e-4
        )
    assert alignment(torch.randn(2, 6, 3), torch.randn(2, 6, 3), "cosine").shape == (2, 6)


def test_patches_are_pooled_where_regions_begin() -> None:
    """A student's second token begins below the first one: x goes with the slow index."""
    patches = torch.arange(16.0).reshape(1, 16, 1)
    found = pooled_patches(patches, 5)[0, :, 0]
    assert found.tolist() == [2.5, 10.5, 4.5, 12.5, 7.5]


def picture(height: int = 60, width: int = 90) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8)


def members_of(pixels: np.ndarray) -> Members:
    import io

    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return Members({"png": target.getvalue(), "json": b'{"label": 1}'})


def test_both_sizes_show_one_crop() -> None:
    options = Config(height=24, width=24, second_size=48, views=2)
    samples, source = SharedCrops(options, 5), SourceInfo("toy", [], Source(shards=""))
    mirrored = 0
    for position in range(8):
        place = Place(0, position, 0, 0, 0)
        arrays = samples(place, source, members_of(picture()))
        assert arrays["video"].shape == (2, 1, 24, 24, 3) and arrays[SECOND].shape == (2, 1, 48, 48, 3)
        again = samples(place, source, members_of(picture()))
        assert all(np.array_equal(arrays[name], again[name]) for name in arrays)
        small = arrays[SECOND].reshape(2, 1, 24, 2, 24, 2, 3).mean((3, 5))
        inside = np.abs(small - arrays["video"])[:, :, 2:-2, 2:-2, :2]
        assert inside.max() < 4, "another crop, or only one of them mirrored"
        assert not np.array_equal(arrays["video"][0], arrays["video"][1])
        mirrored += sum(view[0, 12, 0, 0] > view[0, 12, -1, 0] for view in arrays["video"])
    assert 2 < mirrored < 14


def test_one_size_travels_once() -> None:
    assert set(SharedCrops(Config(height=24, width=24, second_size=24), 0).example(2)) >= {"video"}
    assert SECOND not in SharedCrops(Config(height=24, width=24), 0).example(2)
    example = SharedCrops(Config(height=24, width=24, second_size=48, views=2), 0).example(3)
    assert example["video"].shape == (6, 1, 24, 24, 3) and example[SECOND].shape == (6, 1, 48, 48, 3)


@pytest.mark.parametrize(("share", "interpolation"), [(0.875, "bilinear"), (1.0, "bicubic")])
def test_held_out_pictures_are_cut_as_torchvision_does(share: float, interpolation: str) -> None:
    from PIL import Image

    from pretrain.runtime.vision_ops import ensure_torchvision

    ensure_torchvision()
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    options = Config(height=28, width=28, crop_share=share, interpolation=interpolation)
    found = SharedCrops(options, 0).without_chance(SourceInfo("toy", [], Source(shards="")), members_of(picture()))
    transform = Compose([Resize(round(28 / share), InterpolationMode(interpolation)), CenterCrop(28)])
    assert np.array_equal(found["video"][0, 0], np.array(transform(Image.fromarray(picture()))))


def test_input_is_checked() -> None:
    wrong = Config(frames=2, width=100, second_size=0, area=(0.5, 0.1), aspect=(0, 1), crop_share=2)
    assert {line.split(":")[0] for line in wrong.problems()} == {
        f"input.{name}"
        for name in ("frames", "height=224, input.width=100", "second_size", "area", "aspect", "crop_share")
    }


def test_what_is_trained_and_how(folder: Path) -> None:
    """New parameters at the full rate, tuned blocks at a tenth, regions without decay; the others are no one's."""
    objective = inheriting(folder)
    rates: dict[str, tuple[float, float]] = {}
    names = {id(value): name.removeprefix("model.") for name, value in objective.named_parameters()}
    for group in parameter_groups(objective, 0.05):
        rates |= {names[id(value)]: (group["lr_scale"], group["weight_decay"]) for value in group["params"]}
    tuned = {name for name, (scale, _) in rates.items() if scale == 0.1}
    assert tuned == {f"layers.3.{part}{kind}" for part in PARTS for kind in ("weight", "bias")}
    assert rates["initial_roi.weight"] == (1, 0) and rates["layers.0.mlp.fc1.weight"] == (1, 0.05)
    frozen = set(names.values()) - set(rates)
    assert frozen == {f"layers.4.{part}{kind}" for part in PARTS for kind in ("weight", "bias")} | {
        "norm.weight", "norm.bias", "head.weight", "head.bias",
    }  # fmt: skip


@pytest.mark.parametrize("tokens", ["class", "all"])
def test_a_step_moves_what_looks_and_nothing_that_is_frozen(folder: Path, tokens: str) -> None:
    objective = inheriting(folder, f"objective.tokens={tokens}").train()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    optimiser = torch.optim.AdamW(parameter_groups(objective, 0.05), lr=1e-3)
    for _ in range(2):  # what starts at zero moves what stands before it from the second step on
        optimiser.zero_grad()
        output = objective(batch_of())
        output.loss.backward()
        optimiser.step()
    trained = {name for name, value in objective.named_parameters() if value.requires_grad}
    for name, value in objective.state_dict().items():
        same = torch.equal(value, before[name])
        assert same == (name not in trained), f"{name}: {'stayed' if same else 'moved'}"
    teacher = objective.teacher.module()
    assert all(value.grad is None and not value.requires_grad for value in teacher.parameters())
    assert not any("teacher" in name for name in objective.state_dict())
    assert set(output.metrics) == {"alignment", "similarity"}


def test_the_student_comes_to_answer_as_the_teacher(folder: Path) -> None:
    objective = inheriting(folder, "objective.tuned_lr_scale=1").train()
    optimiser = torch.optim.AdamW(parameter_groups(objective, 0.0), lr=2e-3)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        loss = objective(batch_of(8)).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0], losses


def test_the_teacher_sees_its_own_size_normalised(folder: Path) -> None:
    recipe, batch = recipe_of(folder), batch_of()
    objective = build(recipe)
    teacher = tower_maker(recipe.objective.teacher, 3)()
    teacher.vit.load_state_dict(torch.load(folder / "teacher.pth", weights_only=True))
    pixels = (batch[SECOND][:, 0].permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        answers, wanted = objective.eval().answers(batch), teacher.eval().vit.forward_features(pixels)
        torch.testing.assert_close(answers.teacher, wanted[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            objective.teacher_head(answers.teacher_features), teacher.vit(pixels), rtol=1e-5, atol=1e-5
        )
        seen = (batch["video"] / 255 - 0.5) / 0.5
        torch.testing.assert_close(answers.student, objective.model.forward_features(seen), rtol=1e-5, atol=1e-5)
        every = build(recipe_of(folder, "objective.tokens=all", "objective.align=embedding")).eval()
        found = every.answers(batch)
        assert found.student.shape == found.teacher.shape == (4, 6, 3)
        torch.testing.assert_close(found.teacher[:, 0], teacher.vit(pixels), rtol=1e-5, atol=1e-5)


def test_a_clip_is_compared_behind_its_projection(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, *CLIP, f"objective.teacher.weights={tmp_path / 'clip.pth'}", "model.norm_eps=1e-5")
    tower = VisualTower(recipe.objective.teacher.clip).eval()
    torch.save({f"visual.{name}": value for name, value in tower.state_dict().items()}, tmp_path / "clip.pth")
    assert problems_of(method_of(recipe)) == [] == warnings_of(method_of(recipe))
    objective, batch = build(recipe).eval(), batch_of()
    objective.load_pretrained("clip.pth", torch.load(tmp_path / "clip.pth", weights_only=True))
    assert torch.equal(objective.model.head.weight, tower.head.weight)
    mean, std = (
        torch.tensor(value)[:, None, None]
        for value in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    with torch.no_grad():
        wanted = tower((batch[SECOND][:, 0].permute(0, 3, 1, 2) / 255 - mean) / std)
        torch.testing.assert_close(objective.answers(batch).teacher, wanted, rtol=1e-5, atol=1e-5)


def test_regions_stay_float32_in_half_types(folder: Path) -> None:
    """In bfloat16 a region's corner at 0.9 could not be told from one 1/256 beside it."""
    from pretrain.models.sparseformer.units import Looks

    objective = inheriting(folder)
    model = objective.model.to(torch.bfloat16)
    looks = Looks()
    with torch.no_grad():
        model.encode((batch_of()["video"] / 255).to(torch.bfloat16), looks)
    assert {one.dtype for one in (*looks.regions, *looks.moves, *looks.points, *looks.codes)} == {torch.float32}
    assert objective(batch_of()).loss.dtype == torch.float32


def test_an_earlier_student_is_taken_over_whole(folder: Path) -> None:
    first, second = inheriting(folder), build(recipe_of(folder))
    second.load_pretrained("run", {f"model.{name}": value for name, value in first.model.state_dict().items()})
    assert all(torch.equal(value, second.model.state_dict()[name]) for name, value in first.model.state_dict().items())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run.init_weights=null"], "run.init_weights: found null"),
        (["objective.tune_blocks=3"], "objective.tune_blocks: found 3, allowed: 0 to 2"),
        (["objective.tuned_lr_scale=0"], "objective.tuned_lr_scale"),
        (["objective.teacher.std=[0,1,1]"], "objective.teacher.std"),
        (["model.form=v1"], "model.form: found v1, allowed: bootstrapped"),
        (["model.video=true"], "model.video"),
        (["model.dim=192"], "model.dim: found 192, allowed: 128, the teacher's channels"),
        (["model.activation=quick_gelu"], "model.activation: found quick_gelu, allowed: gelu"),
        (["model.depth=4"], "model.depth: 4 inherited units, but the teacher has 3 blocks"),
        (["input.second_size=null"], "input.second_size: found 32, allowed: 48"),
        (["objective.teacher.arguments=[embed_dim=128,depth=3,num_heads=4,img_size=48]"], "4 heads of 32 channels"),
        (["objective.teacher.arguments=[embed_dim]"], "objective.teacher.arguments: found embed_dim"),
        (["objective.teacher.architecture=no_such_vit"], "objective.teacher.architecture=no_such_vit"),
        (["objective.teacher.architecture=resnet18", "objective.teacher.arguments=[]"], "no ViT of timm's plain kind"),
        (["objective.align=embedding", "model.classes=0"], "objective.align"),
        (["objective.held_out.labels=true", "model.classes=0"], "objective.held_out.labels"),
        (["objective.held_out.micro=0"], "objective.held_out.micro"),
        (["objective.held_out.labels=true", "objective.held_out.zero_shot.class_names=imagenet"], "needs a text tower"),
        ([*CLIP, "objective.held_out.labels=true"], "found null, allowed with labels and a CLIP"),
        ([*CLIP, "model.classes=4"], "model.classes: found 4, allowed: 3, the teacher's outputs"),
        ([*CLIP, "model.head_bias=true"], "model.head_bias: found true"),
    ],
)
def test_what_can_not_work_is_refused(folder: Path, words: list[str], expected: str) -> None:
    found = problems_of(method_of(recipe_of(folder, *words)))
    assert any(expected in line for line in found), found


def test_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    text = (folder / "bootstrap.yaml").read_text()
    start = text.index("objective:")
    (tmp_path / "other.yaml").write_text("model: {name: image_vit}\n" + text[start:])
    found = problems_of(method_of(load_recipe(str(tmp_path / "other.yaml"))))
    assert any("model.name: found image_vit" in line for line in found), found


def test_another_epsilon_is_told(folder: Path) -> None:
    assert problems_of(method_of(recipe_of(folder))) == [] == warnings_of(method_of(recipe_of(folder)))
    (line,) = warnings_of(method_of(recipe_of(folder, "model.norm_eps=null")))
    assert line.startswith("model.norm_eps=1e-05, the teacher's blocks were trained with 1e-06")


def test_facts_of_teachers(folder: Path) -> None:
    sizes = "[embed_dim=128,depth=2,num_heads=2,dynamic_img_size=true]"
    words = ["architecture=vit_small_patch14_reg4_dinov2.lvd142m", f"arguments={sizes}"]
    options = recipe_of(folder, *(f"objective.teacher.{word}" for word in words))
    facts = facts_of(options.objective.teacher, 0)
    assert (facts.dim, facts.depth, facts.heads, facts.outputs, facts.image_size) == (128, 2, 2, 0, None)
    assert facts.mean == (0.485, 0.456, 0.406) and facts.norm_eps == 1e-6 and facts.class_token
    options.objective.teacher.weights = "nowhere.pth"
    tower = frozen_teacher(options.objective.teacher, 0)
    tower.build_empty()
    assert tower.footprint().parameters == sum(value.numel() for value in tower.module().parameters())


def test_a_step_is_traced_with_its_teacher(folder: Path) -> None:
    method = method_of(recipe_of(folder, "objective.tokens=all"))
    trace = trace_step(method, 2, on_cpu=True)
    assert trace.clips == 2 and trace.flops() > 2 * 2 * method.cost().executed


def judged(folder: Path, toy: Any, objective: BootstrapObjective, *words: str) -> dict[str, float]:
    shards = f"objective.held_out.shards={toy.folder / 'shards'}"
    recipe = recipe_of(folder, shards, "objective.held_out.micro=16", *words)
    evaluation = method_of(recipe).evaluation(ALONE)
    assert isinstance(evaluation, BootstrapEvaluation)
    assert evaluation.best_by in (found := evaluation(objective))
    return found


def test_comparison_on_held_out_pictures(folder: Path, toy: Any) -> None:
    objective = inheriting(folder).eval()
    found = judged(folder, toy, objective)
    assert set(found) == {"similarity", "alignment", "pictures"} and found["pictures"] == 40
    assert found["similarity"] == pytest.approx(1 - found["alignment"], abs=1e-5)
    scored = judged(folder, toy, objective, "objective.held_out.labels=true")
    assert {"top1", "teacher_top1", "agreement"} <= set(scored) and not {"top5", "teacher_top5"} & set(scored)
    assert scored["similarity"] == pytest.approx(found["similarity"])


def test_a_student_that_is_the_teacher_agrees_in_all(folder: Path, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = inheriting(folder).eval()

    def the_teachers(batch: Any) -> Any:
        answers = BootstrapObjective.answers(objective, batch)
        return answers._replace(student=answers.teacher, features=answers.teacher_features)

    monkeypatch.setattr(objective, "answers", the_teachers)
    found = judged(folder, toy, objective, "objective.held_out.labels=true")
    assert found["similarity"] == pytest.approx(1, abs=1e-5) and found["agreement"] == 100
    assert found["top1"] == found["teacher_top1"]


def test_labels_are_numbers_or_names(folder: Path, toy: Any, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("night\nday\nnoon\n")
    held_out = [f"shards={toy.folder / 'shards'}", "labels=true", f"zero_shot.class_names={tmp_path / 'names.txt'}"]
    recipe = recipe_of(folder, *CLIP, *(f"objective.held_out.{word}" for word in held_out))
    evaluation = method_of(recipe).evaluation(ALONE)
    assert evaluation._targets(["day", "2", "night"], 3) == [1, 2, 0]
    assert evaluation._targets(["n03", "n01", "n02", "n01"], 3) == [2, 0, 1, 0]
    for wrong in (["3"], ["n03", "n01"], ["-1"]):
        with pytest.raises(DataError, match="is no class|are no class"):
            evaluation._targets(wrong, 3)


def test_a_run_from_start_to_export(folder: Path, toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a user does: inherits, trains, compares, saves; frozen weights are the teacher's to the end."""
    words = [
        "schedule.epochs=1",
        f"objective.held_out.shards={toy.folder / 'shards'}",
        "objective.held_out.labels=true",
    ]
    script = ROOT / "launch" / "pretrain.py"
    run = tmp_path / "run"
    output = train([script, "--recipe", folder / "bootstrap.yaml", f"run.dir={run}", *words], 1, tmp_path)
    assert "blocks 1 to 2 became layers 3, 4" in output
    assert '"metric": "top1"' in (run / "best.json").read_text()
    trained = load_trained(run)
    state, teacher = consolidated_state(trained.source), torch.load(folder / "teacher.pth", weights_only=True)
    for part in PARTS:
        assert torch.equal(state[f"model.layers.4.{part}weight"], teacher[f"blocks.2.{part}weight"])
        assert not torch.equal(state[f"model.layers.3.{part}weight"], teacher[f"blocks.1.{part}weight"])
    method = trained.method
    method.exports(trained.source)["safetensors"].write(trained.objective, str(tmp_path / "out"))
    again = load_trained(tmp_path / "out")
    for name, value in trained.objective.state_dict().items():
        assert torch.equal(value, again.objective.state_dict()[name]), name
    assert asdict(again.recipe.model) == asdict(trained.recipe.model)
    assert main([str(tmp_path / "out"), str(toy.folder / "shards"), "--micro", "16"]) == 0
    shown = capsys.readouterr().out
    assert "40 pictures" in shown and re.search(r"\d  teacher, top-1, %", shown) and "top-5" not in shown
    tower, images = visual_tower(tmp_path / "out"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(tower(images), trained.objective.model(images))
    assert (tower.image_size, tower.image_mean, tower.output_dim) == ((32, 32), (0.5, 0.5, 0.5), 3)


def test_zero_shot_with_the_teachers_text_tower(folder: Path, toy: Any, tmp_path: Path) -> None:
    """Scores of both are cosines with the same sentences."""
    (tmp_path / "names.txt").write_text("square\nsky\nsea\n")
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n{}\n")
    held_out = [f"shards={toy.folder / 'shards'}", "labels=true", f"zero_shot.class_names={tmp_path / 'names.txt'}",
                f"zero_shot.templates={tmp_path / 'templates.txt'}"]  # fmt: skip
    recipe = recipe_of(folder, *CLIP, f"objective.teacher.weights={tmp_path / 'clip.pth'}", "model.norm_eps=1e-5",
                       *(f"objective.held_out.{word}" for word in held_out))  # fmt: skip
    torch.manual_seed(4)
    both = CLIPModel(recipe.objective.teacher.clip).eval()
    torch.save(both.state_dict(), tmp_path / "clip.pth")
    objective = build(recipe).eval()
    objective.load_pretrained("clip.pth", both.state_dict())
    evaluation = method_of(recipe).evaluation(ALONE)
    found = evaluation(objective)
    texts = [["a photo of a square.", "square"], ["a photo of a sky.", "sky"], ["a photo of a sea.", "sea"]]
    ids = torch.from_numpy(Tokenizer("clip", 77, too_long="cut").encode([text for one in texts for text in one]).ids)
    with torch.no_grad():
        means = F.normalize(F.normalize(both.text(ids), dim=-1).unflatten(0, (3, 2)).mean(1), dim=-1)
        torch.testing.assert_close(evaluation._classes, means, rtol=1e-5, atol=1e-5)
        batch = next(evaluation._pictures.batches())
        answers = objective.answers(batch.rows)
        right = (answers.teacher @ means.t()).argmax(-1) == torch.tensor([int(label) for label in batch.labels])
    assert len(batch.labels) == 40 and found["teacher_top1"] == pytest.approx(100 * right.float().mean().item())
    assert 0 <= found["top1"] <= 100


def test_weights_to_start_from_may_lie_on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def located(key: str, weights: str) -> str:
        asked.append((key, weights))
        return str(folder / "teacher.pth")

    monkeypatch.setattr(initial_weights, "locate", located)
    assert "blocks.2.norm1.weight" in initial_weights.read_weights("hub:owner/name")
    assert asked == [("run.init_weights", "hub:owner/name")]
