"""Speed co-augmentation: what its losses are, over ranks too, where gradients go, what a run does, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.commands import export
from finetune.recipe import load_tune_recipe
from pretrain.checkpoint.consolidate import consolidated_state
from pretrain.commands import retrieve, sound_statistics
from pretrain.data.samples import SourceInfo
from pretrain.errors import WeightsError
from pretrain.models.initial_weights import read_weights
from pretrain.objectives.base import method_of, problems_of, warnings_of
from pretrain.objectives.speed_coaug import SpeedCoaugObjective
from pretrain.objectives.speed_coaug_evaluation import class_scores, pair_scores
from pretrain.objectives.speed_coaug_loss import (
    FILE,
    HEARD,
    HEARD_KEY,
    SEEN,
    SEEN_KEY,
    SPEED,
    PairLoss,
    SoftTarget,
    affinity_weights,
    pair_terms,
    queue_terms,
    schedule_weights,
)
from pretrain.plan.trace import trace_step
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Recipe, Source
from pretrain.runtime.process_group import Ranks
from pretrain.samples.audio_video import AudioVideo
from tests.talking_films import members_of_film, sine, talking_film
from tests.toy_run import Toy
from tests.toy_shards import index, write_shard

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
SCALE = 1 / 0.07
RECIPE = """\
model: {name: r2plus1d, width: 8, blocks: [1, 1, 1, 1], classes: 0}
objective:
  name: speed_coaug
  head: [16, 16, 8]
  sound: {width: 8}
  loss: {soft: {dim: 8}}
input:
  frames: 4
  fps: 8
  height: 32
  width: 32
  sound: {rate: 8000, seconds: 0.5}
  spectrogram: {window: 128, rate: 50}
data:
  sources: {toy: {shards: SHARDS}}
  lanes: 4
  shuffle_window: 4
  workers: 0
batch: {samples: 8, micro: 8}
optim: {name: adam, base_lr: 1e-3, base_batch: 8, weight_decay: 1e-5, betas: [0.9, 0.999]}
schedule: {epochs: 3, warmup_epochs: 0, shape: constant}
compute: {dtype: fp32}
zero: {stage: 0}
checkpoint: {every_steps: 3, keep_last: 2}
log: {every_steps: 1, pictures_every_steps: 0, wandb: disabled, peak_tflops: 0.1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen films of two seconds with tones, one film without sound, a recipe over them."""
    where = tmp_path_factory.mktemp("speed_coaug")
    (where / "shards").mkdir()
    films = [
        (f"{n:04d}", {"label": n % 4}, talking_film(sine(300 + 90 * n, 2.0), frames=60, fps=30)) for n in range(16)
    ]
    mute = ("mute", {"label": 0}, talking_film(None, frames=60, fps=30))
    write_shard(where / "shards" / "toy-000000.tar", [*films[:8], mute])
    write_shard(where / "shards" / "toy-000001.tar", films[8:])
    index(where / "shards")
    (where / "toy.yaml").write_text(RECIPE.replace("SHARDS", str(where / "shards")))
    return where


def recipe_of(folder: Path, *words: str) -> Recipe:
    return load_recipe(str(folder / "toy.yaml"), list(words))


def build(recipe: Recipe, seed: int = 1) -> SpeedCoaugObjective:
    torch.manual_seed(seed)
    objective = method_of(recipe).build()
    assert isinstance(objective, SpeedCoaugObjective)
    return objective


def rows_of(files: int = 5, views: int = 2, dim: int = 6) -> dict[str, Tensor]:
    """Embeddings as a step has them."""
    rng = torch.Generator().manual_seed(0)

    def unit(size: int) -> Tensor:
        return F.normalize(torch.randn(files * views, size, generator=rng), dim=1)

    speeds = torch.tensor([[1.0, 1.0], [2.0, 2.0]])[:views].repeat(files, 1)
    return {
        SEEN: unit(dim), HEARD: unit(dim), SEEN_KEY: unit(4), HEARD_KEY: unit(4), SPEED: speeds,
        FILE: torch.arange(files).repeat_interleave(views),
    }  # fmt: skip


def logs(anchors: Tensor, candidates: Tensor) -> Tensor:
    return (anchors @ candidates.t() * SCALE).log_softmax(1)


def losses(rows: dict[str, Tensor], views: int = 2, **options: Any) -> tuple[Tensor, Tensor]:
    found = pair_terms(rows, PairLoss(**options), SCALE, ALONE, views)
    return found.of_seen, found.of_heard


def test_without_weight_it_is_plain_info_nce() -> None:
    """w = 0, and the other speed a negative: InfoNCE over 2B candidates, the soft loss and the hard one."""
    rows = rows_of()
    expected = F.cross_entropy(rows[SEEN] @ rows[HEARD].t() * SCALE, torch.arange(10), reduction="none")
    nothing = {"soft": SoftTarget(kind="const", alpha=0.0)}
    torch.testing.assert_close(losses(rows, **nothing)[0], expected)
    torch.testing.assert_close(losses(rows, form="log_of_sum", **nothing)[0], expected)
    torch.testing.assert_close(losses(rows, kind="info_nce", same_file="negative")[0], expected)


def test_full_weight_is_two_positives() -> None:
    rows, other = rows_of(), torch.arange(10) ^ 1
    for found, shares in zip(losses(rows, soft=SoftTarget(kind="const", alpha=1.0)),
                             (logs(rows[SEEN], rows[HEARD]), logs(rows[HEARD], rows[SEEN])), strict=True):  # fmt: skip
        torch.testing.assert_close(found, -shares.diagonal() - shares[torch.arange(10), other])


def test_the_other_speed_is_left_out_of_the_hard_loss() -> None:
    rows = rows_of()
    logits = rows[SEEN] @ rows[HEARD].t() * SCALE
    logits[torch.arange(10), torch.arange(10) ^ 1] = -torch.inf
    torch.testing.assert_close(
        losses(rows, kind="info_nce")[0], F.cross_entropy(logits, torch.arange(10), reduction="none")
    )
    one = {name: value[::2] for name, value in rows.items()}
    torch.testing.assert_close(
        losses(one, views=1, kind="info_nce")[0],
        F.cross_entropy(one[SEEN] @ one[HEARD].t() * SCALE, torch.arange(5), reduction="none"),
    )


@pytest.mark.parametrize("form", ["sum_of_logs", "log_of_sum"])
def test_other_samples_of_a_file_are_no_negatives(form: Any) -> None:
    """As long as the mask is on; the other speed stays a soft positive either way."""
    rows = rows_of()
    rows[FILE] = torch.tensor([0, 0, 1, 1, 0, 0, 2, 2, 3, 3])
    logits = rows[SEEN] @ rows[HEARD].t() * SCALE
    plain = logits.log_softmax(1)
    logits[:2, 4:6] = logits[4:6, :2] = -torch.inf
    for mask, shares in ((True, logits.log_softmax(1)), (False, plain)):
        first, second = shares.diagonal(), shares[torch.arange(10), torch.arange(10) ^ 1]
        expected = -(first + 0.5 * second) if form == "sum_of_logs" else -(first.exp() + 0.5 * second.exp()).log()
        found = losses(rows, form=form, mask_same_file=mask, soft=SoftTarget(kind="const"))[0]
        torch.testing.assert_close(found, expected)


def test_weights() -> None:
    rows = rows_of()
    of_seen, of_heard = affinity_weights(rows[SEEN_KEY], rows[HEARD_KEY], 2.0)
    for row in range(10):
        pair = [row, row ^ 1]
        own = (2 * rows[HEARD_KEY][pair] @ rows[SEEN_KEY][row]).softmax(0)
        theirs = (2 * rows[SEEN_KEY][pair] @ rows[HEARD_KEY][row]).softmax(0)
        assert float(of_seen[row]) == pytest.approx(float(own[1]), abs=1e-6)
        assert float(of_heard[row]) == pytest.approx(float(theirs[1]), abs=1e-6)
    of_seen, of_heard = schedule_weights(torch.tensor([[1.0, 1.0], [2.0, 1.5]]))
    assert of_seen[:, 0].tolist() == pytest.approx([1 / 1.5, 0.5])
    assert of_heard[:, 0].tolist() == pytest.approx([0.5, 1 / 1.5])


def test_neighbours_from_a_queue() -> None:
    """SNCLR's rule: the nearest to the positive, weighed by the anchor, those of all rows in each softmax."""
    rows, queue = rows_of(4), F.normalize(torch.randn(30, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    options = PairLoss(soft=SoftTarget(kind="affinity_queue", neighbours=3))
    found = queue_terms(rows, (queue, queue), options, SCALE, ALONE, 2).of_seen
    nearest = queue[(rows[HEARD] @ queue.t()).topk(3).indices]
    logits = torch.cat((rows[SEEN] @ rows[HEARD].t(), rows[SEEN] @ nearest.flatten(0, 1).t()), dim=1) * SCALE
    shares = logits.log_softmax(1)
    weights = torch.einsum("bd,bkd->bk", rows[SEEN], nearest).softmax(1)
    for row in range(8):
        own = shares[row, 8 + 3 * row : 11 + 3 * row]
        assert float(found[row]) == pytest.approx(-float(shares[row, row] + (weights[row] * own).sum()), abs=1e-5)


def batch_of(recipe: Recipe, samples: int = 4) -> dict[str, Any]:
    """Made-up rows, each another one."""
    rng = torch.Generator().manual_seed(2)
    found: dict[str, Any] = method_of(recipe).example(samples)
    found["video"] = torch.randint(0, 256, found["video"].shape, generator=rng, dtype=torch.uint8)
    found["sound"] = torch.randn(found["sound"].shape, generator=rng)
    return found


@pytest.mark.parametrize("detach", [False, True])
def test_gradient_reaches_the_affinity_unless_detached(folder: Path, detach: bool) -> None:
    recipe = recipe_of(folder, f"objective.loss.soft.detach={str(detach).lower()}")
    objective = build(recipe)
    objective(batch_of(recipe)).loss.backward()
    assert objective.affinity is not None
    reached = [value.grad is not None and bool(value.grad.abs().sum() > 0) for value in objective.affinity.parameters()]
    assert reached == [not detach] * 2
    others = [name for name, value in objective.named_parameters() if value.grad is None]
    assert all(name.startswith("affinity.") for name in others)


def test_options_of_the_loss(folder: Path) -> None:
    recipe = recipe_of(folder)
    batch = batch_of(recipe)
    plain = float(build(recipe)(batch).loss.detach())
    scaled = float(build(recipe_of(folder, "objective.loss.scale_2tau=true"))(batch).loss.detach())
    assert scaled == pytest.approx(plain * 0.14, rel=1e-5)
    learnt = build(recipe_of(folder, "objective.loss.learnable=true"))
    loss = learnt(batch).loss
    assert loss.item() == pytest.approx(plain, rel=1e-5)
    loss.backward()
    assert learnt.scale is not None and learnt.scale.logit_scale.grad is not None
    assert not learnt.rule("scale.logit_scale", ()).decays and learnt.rule("model.stem.bn.bias", (8,)).decays
    within = build(recipe_of(folder, "objective.loss.within=0.5"))
    rows = within.embed(batch)
    seen, heard = rows[SEEN].unflatten(0, (-1, 2)), rows[HEARD].unflatten(0, (-1, 2))
    own = sum(-logs(one[:, a], one[:, 1 - a]).diagonal().mean() for one in (seen, heard) for a in (0, 1)) / 2
    assert float(within(batch).loss) == pytest.approx(plain + 0.5 * float(own), rel=1e-4)
    chunked = build(recipe_of(folder, "objective.loss.chunk=3"))
    assert float(chunked(batch).loss) == pytest.approx(plain, rel=1e-5)


def test_a_queue_takes_in_what_was_trained_on(folder: Path) -> None:
    soft = ["objective.loss.soft.kind=affinity_queue", "objective.loss.soft.queue=12"]
    recipe = recipe_of(folder, *soft, "input.views=1", "input.speeds=[1]")
    assert problems_of(method_of(recipe)) == []
    objective = build(recipe)
    before = objective.queues[1].clone()
    rows = objective.embed(batch_of(recipe))
    objective.compare(rows)
    assert torch.equal(objective.queues[1], before), "comparing changes no state"
    objective.after_step()
    assert torch.equal(objective.queues[1], torch.cat((rows[HEARD].detach(), before[:8])))
    assert set(objective.rank_state()) == {"seen_queue", "heard_queue"}


def test_scores() -> None:
    same = torch.ones(4, 2) / 2**0.5
    assert pair_scores(same, same)["video_to_sound_R@1"] == 0, "who answers alike to all finds nothing"
    perfect = torch.eye(5)
    found = pair_scores(perfect, perfect[[1, 0, 2, 3, 4]])
    assert found["video_to_sound_R@1"] == 60 == found["sound_to_video_R@1"]
    queries = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    assert class_scores(queries, list("aabb"), queries, list("aabb"))["class_R@1"] == 100, "not the query itself"
    assert class_scores(queries, list("aabb"), queries.clone(), list("bbaa"))["class_R@1"] == 0


def avid_file(objective: SpeedCoaugObjective) -> dict[str, Tensor]:
    """The towers under AVID's names, other numbers in each."""
    rng = torch.Generator().manual_seed(7)
    seen = {f"video_model.{name}": value for name, value in objective.model.to_official().items()}
    heard = {f"audio_model.{name}": value for name, value in objective.audio_encoder.state_dict().items()}
    heads = {f"{kind}_proj.projection.{name}": value for kind in ("video", "audio")
             for name, value in getattr(objective, f"{kind}_head").state_dict().items()}  # fmt: skip
    return {f"module.{name}": value + torch.rand(value.shape, generator=rng).to(value.dtype)
            for name, value in (seen | heard | heads).items()}  # fmt: skip


def test_avids_weights_come_in_whole_or_not(folder: Path) -> None:
    objective = build(recipe_of(folder))
    raw = avid_file(objective)
    assert {"module.video_model.conv1.0.weight", "module.video_model.conv3x.0.res_conv.weight",
            "module.video_model.conv5x.0.out_bn.running_var", "module.audio_model.block4.bn2.bias",
            "module.audio_proj.projection.4.weight"} <= set(raw)  # fmt: skip
    objective.load_pretrained("avid.pth", raw)
    theirs = raw["module.video_model.conv2x.0.spt_conv1.weight"]
    assert torch.equal(objective.model.stages[0][0].space1.weight, theirs)
    assert torch.equal(objective.audio_head[4].bias, raw["module.audio_proj.projection.4.bias"])
    assert torch.equal(objective.audio_encoder.block1.bn1.weight, raw["module.audio_model.block1.bn1.weight"])
    del raw["module.audio_model.block2.conv1.weight"]
    with pytest.raises(WeightsError, match=r"missing: audio_encoder\.block2\.conv1\.weight"):
        objective.load_pretrained("avid.pth", raw)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.classes=3"], "model.classes: found 3"),
        (["compute.dtype=bf16"], "compute.dtype: found bf16"),
        (["input.views=1"], "needs the other speed"),
        (["input.views=1", "objective.loss.kind=info_nce", "objective.loss.within=1"], "objective.loss.within"),
        (["objective.loss.temperature=0"], "objective.loss.temperature"),
        (["objective.loss.soft.alpha=2"], "objective.loss.soft.alpha"),
        (["objective.loss.soft.neighbours=9", "objective.loss.soft.queue=4"], "objective.loss.soft"),
        (["objective.head=[]"], "objective.head"),
        (["objective.sound.kind=vit", "objective.sound.heads=5"], "objective.sound.heads"),
        (["objective.held_out.gallery=somewhere"], "objective.held_out.gallery"),
        (["input.name=clip"], "takes audio_video"),
    ],
)  # fmt: skip
def test_what_can_not_work_is_refused(folder: Path, words: list[str], told: str) -> None:
    text = (folder / "toy.yaml").read_text()
    if "input.name=clip" in words:
        start, end = text.index("  sound: {rate"), text.index("data:")
        (folder / "clip.yaml").write_text(text[:start] + text[end:])
        found = problems_of(method_of(load_recipe(str(folder / "clip.yaml"), words)))
    else:
        found = problems_of(method_of(recipe_of(folder, *words)))
    assert any(told in line for line in found), found


def test_recipes_of_other_encoders(folder: Path, tmp_path: Path) -> None:
    """Any classifier is the video encoder; the sound's may be a ViT; then half precision is no matter."""
    assert problems_of(method_of(recipe_of(folder))) == [] == warnings_of(method_of(recipe_of(folder)))
    text = (folder / "toy.yaml").read_text().split("objective:", 1)[1]
    model = "model: {name: classifier, size: custom, patch_size: 16, dim: 32, depth: 1, heads: 2, mlp_ratio: 2}\n"
    (tmp_path / "vit.yaml").write_text(f"{model}objective:{text}")
    words = ["objective.sound.kind=vit", "objective.sound.dim=16", "objective.sound.depth=1", "objective.sound.heads=2"]
    recipe = load_recipe(str(tmp_path / "vit.yaml"), [*words, "compute.dtype=bf16", "model.classes=0"])
    method = method_of(recipe)
    assert problems_of(method) == []
    objective = build(recipe).bfloat16()
    output = objective(batch_of(recipe))
    assert output.loss.dtype == torch.float32 and torch.isfinite(output.loss)
    output.loss.backward()
    assert trace_step(method, 2, on_cpu=True).flops() > 2 * method.cost().executed
    hard = [f"objective.loss.{word}" for word in ("kind=info_nce", "same_file=negative")]
    (told,) = warnings_of(method_of(recipe_of(folder, *hard)))
    assert "hard negative" in told


def toy_of(folder: Path, name: str = "toy.yaml") -> Toy:
    return Toy(folder / name, folder)


def test_statistics_of_a_recipes_videos(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured by the command, taken by the recipe: bins are normal over the same windows."""
    out = str(tmp_path / "statistics.npz")
    assert sound_statistics.main([out, "--recipe", str(folder / "toy.yaml")]) == 0
    assert "16 windows, 1 videos left out" in capsys.readouterr().out
    recipe = recipe_of(folder, f"input.spectrogram.statistics={out}")
    samples = method_of(recipe).samples()
    assert isinstance(samples, AudioVideo)
    film = members_of_film(talking_film(sine(300, 2.0), frames=60))
    found = samples.without_chance(SourceInfo("toy", [], Source(shards="")), film)["sound"]
    own = AudioVideo(recipe_of(folder).input, 0).without_chance(SourceInfo("toy", [], Source(shards="")), film)["sound"]
    assert found.shape == own.shape == (1, 25, 33) and abs(float(own.mean())) < 1e-3 < abs(float((found - own).max()))
    assert sound_statistics.main([out, "--recipe", "vit_s_dual"]) == 2
    assert "allowed: audio_video" in capsys.readouterr().err


def test_a_run_from_start_to_fine_tuning(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trains, counts the film without sound, retrieves, exports; the video encoder starts a classifier by itself."""
    shards = folder / "shards"
    held_out = [f"objective.held_out.{word}" for word in (f"pairs={shards}", f"queries={shards}", "clips=2")]
    toy = toy_of(folder)
    output = toy.train("run", *held_out)
    assert "unusable sample replaced (no_sound" in output and "held_out.pairs: mute can't be used" in output
    last = [record for record in toy.records("run") if "eval/pairs" in record][-1]
    assert last["eval/pairs"] == 16 and last["eval/queries"] == 17 and 0 <= last["eval/class_R@1"] <= 100
    words = ["--pairs", str(shards), "--queries", str(shards), "--clips", "2"]
    assert retrieve.main([str(folder / "run"), *words]) == 0
    assert f"{last['eval/video_to_sound_R@5']:9.2f}  video_to_sound_R@5" in capsys.readouterr().out
    assert retrieve.main([str(folder / "run")]) == 2 and "--pairs or --queries" in capsys.readouterr().err
    state = consolidated_state(next((folder / "run" / "checkpoints").glob("step_00000006")))
    towers = str(tmp_path / "towers.safetensors")
    assert export.main([str(folder / "run"), towers, "--format", "towers"]) == 0
    parts = {name.partition(".")[0] for name in safetensors.torch.load_file(towers)}
    assert parts == {"video_encoder", "audio_encoder", "video_head", "audio_head", "affinity"}
    again = build(recipe_of(folder), seed=9)
    again.load_pretrained(towers, safetensors.torch.load_file(towers))
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items() if "affinity" not in name)
    assert export.main([str(folder / "run"), str(tmp_path / "video")]) == 0
    text = FINE_TUNING.replace("SHARDS", str(folder / "shards"))
    (tmp_path / "tune.yaml").write_text(text)
    for start in (str(folder / "run"), str(tmp_path / "video"), towers):
        recipe = load_tune_recipe(str(tmp_path / "tune.yaml"))
        assert problems_of(method_of(recipe)) == []
        classifier = method_of(recipe).build()
        classifier.load_pretrained(start, read_weights(start))
        assert torch.equal(classifier.model.stages[3][0].time2.weight, state["model.stages.3.0.time2.weight"]), start


FINE_TUNING = """\
model: {name: r2plus1d, width: 8, blocks: [1, 1, 1, 1], classes: 4}
objective: {name: classification}
input: {frames: 4, stride: 2, height: 32, width: 32}
data: {sources: {toy: {shards: SHARDS, labels: integer, sampling: strided}}, lanes: 4, shuffle_window: 4, workers: 0}
batch: {samples: 8, micro: 8}
augment: {randaugment: null, erasing: 0, mixup: 0, cutmix: 0}
compute: {dtype: fp32}
"""


@pytest.mark.faults
def test_two_ranks_are_one_and_go_on_after_a_kill(folder: Path) -> None:
    toy = toy_of(folder)
    toy.train("one", "batch.micro=8")
    toy.train("two", "batch.micro=4", ranks=2)
    # Batch norm, gathers and masks see all rows: only the order of sums differs, which Adam makes larger from step
    # to step: its first ones have one size for any gradient.
    alone, together = toy.losses("one"), toy.losses("two")
    assert together[0] == pytest.approx(alone[0], rel=1e-5) and together[1] == pytest.approx(alone[1], rel=1e-3)
    process = toy.start("killed", "batch.micro=4", ranks=2)
    toy.wait_for("killed", 4, process, timeout_s=300)
    toy.kill(process)
    toy.train("killed", "batch.micro=4", ranks=2)
    by_step = {record["step"]: record["train/loss"] for record in toy.records("killed") if "train/loss" in record}
    assert [by_step[step] for step in range(1, 7)] == toy.losses("two"), "bit for bit"
    ends = [consolidated_state(folder / name / "checkpoints" / "step_00000006") for name in ("two", "killed")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
