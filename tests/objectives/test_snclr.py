"""SNCLR: what is compared, which neighbours count, what is refused, and runs over ranks, resumes and exports."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.checkpoint.consolidate import consolidated_state
from pretrain.engine.build import open_cache
from pretrain.engine.optimiser import parameter_groups
from pretrain.errors import CheckpointError, WeightsError
from pretrain.models.image_vit import ImageViT
from pretrain.models.weight_files import read_raw
from pretrain.models.weights import load_weights
from pretrain.objectives.base import method_of, problems_of, warnings_of
from pretrain.objectives.snclr import SNCLRObjective
from pretrain.objectives.snclr_queue import KeyQueue, Neighbours
from pretrain.plan.trace import trace_step
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Recipe
from pretrain.trained.load_run import load_trained
from tests.toy_run import STEPS_PER_EPOCH, Toy

RECIPE = """\
model: {name: moco_vit, image_size: 32, patch_size: 8, dim: 32, depth: 2, heads: 4, mlp_ratio: 2}
objective: {name: snclr, dim: 16, hidden: 24, neighbours: 3, queue: 20}
input: {height: 32, width: 32}
data:
  sources: {toy: {shards: SHARDS}}
  lanes: 4
  shuffle_window: 4
  workers: 0
batch: {samples: 8, micro: 4}
optim: {base_lr: 1e-2, base_batch: 8, base_min_lr: 1e-4, betas: [0.9, 0.999], weight_decay: 0.1}
schedule: {epochs: 2, warmup_epochs: 0.4}
compute: {dtype: fp32}
zero: {stage: 0}
checkpoint: {every_steps: 4, keep_last: 2}
log: {every_steps: 1, pictures_every_steps: 0, wandb: disabled, peak_tflops: 0.1}
"""
RESNET = "model: {name: picture_resnet, width: 8, blocks: [1, 1, 1, 1], classes: 0}"
CLIPS = "model: {name: classifier, size: custom, patch_size: 16, dim: 32, depth: 2, heads: 2, mlp_ratio: 2, classes: 0}"


@pytest.fixture(scope="module")
def own(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The recipe over the shards of small videos."""
    folder = tmp_path_factory.mktemp("snclr")
    vit, _, rest = RECIPE.replace("SHARDS", str(toy.folder / "shards")).partition("\n")
    for name, model in (("snclr", vit), ("resnet", RESNET), ("clips", CLIPS)):
        (folder / f"{name}.yaml").write_text(f"{model}\n{rest}")
    return Toy(folder / "snclr.yaml", folder)


def recipe_of(own: Toy, *words: str, name: str = "snclr") -> Recipe:
    return load_recipe(str(own.folder / f"{name}.yaml"), list(words))


def build(own: Toy, *words: str, name: str = "snclr") -> SNCLRObjective:
    torch.manual_seed(1)
    objective = method_of(recipe_of(own, *words, name=name)).build()
    assert isinstance(objective, SNCLRObjective)
    # Both encoders alike would give both views' keys for nothing; biases and scales as trained ones.
    with torch.no_grad():
        for value in objective.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.05)
    return objective.train()


def batch_of(samples: int = 4, frames: int = 1, number: int = 0) -> dict[str, Any]:
    pixels = np.random.default_rng(number).integers(256, size=(2 * samples, frames, 32, 32, 3), dtype=np.uint8)
    rows = [key for key in range(samples) for _ in range(2)]
    return {"video": torch.from_numpy(pixels), "source": torch.zeros(2 * samples, dtype=torch.int64),
            "key": [f"file {number} {row}" for row in rows]}  # fmt: skip


def embedded(objective: SNCLRObjective, number: int = 0) -> dict[str, Tensor]:
    return objective.embed(batch_of(number=number))


def info_nce_of(rows: dict[str, Tensor], view: int, temperature: float) -> Tensor:
    logits = F.normalize(rows[f"prediction_{view}"], dim=1) @ F.normalize(rows[f"key_{1 - view}"], dim=1).t()
    return F.cross_entropy(logits / temperature, torch.arange(len(logits)))


def test_without_neighbours_it_is_info_nce(own: Toy) -> None:
    objective = build(own, "objective.neighbours=0")
    rows = embedded(objective)
    loss, metrics = objective.compare(rows)
    torch.testing.assert_close(loss, 0.4 * (info_nce_of(rows, 0, 0.2) + info_nce_of(rows, 1, 0.2)))
    assert set(metrics) >= {"queue_random"} and "positiveness_entropy" not in metrics


def contrasted(objective: SNCLRObjective, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor, Neighbours]:
    """Loss of the first view, log shares of its columns in a softmax over all, and its neighbours, written out."""
    found = objective.neighbours(rows["key_1"], rows["file"])
    loss, _ = objective.contrast(rows["prediction_0"], rows["projection_0"], rows["key_1"], found)
    targets = F.normalize(torch.cat((rows["key_1"][:, None], found.vectors), dim=1), dim=-1)
    logits = torch.einsum("bd,gkd->bgk", F.normalize(rows["prediction_0"], dim=1), targets) / 0.2
    shares = logits.flatten(1).log_softmax(1).unflatten(1, logits.shape[1:])
    return loss, shares.diagonal(dim1=0, dim2=1).t(), found


@pytest.mark.parametrize("words", [(), ("objective.attention=linear", "objective.attention_scale=2")])
def test_both_forms_of_the_loss(own: Toy, words: tuple[str, ...]) -> None:
    """Of the logs of all positives, and of the log of their sum; both teach the projection how far neighbours count."""
    for form in ("code", "paper"):
        objective = build(own, f"objective.form={form}", *words)
        rows = embedded(objective)
        rows["projection_0"].retain_grad()
        loss, shares, found = contrasted(objective, rows)
        anchors, neighbours = F.normalize(rows["projection_0"], dim=1), F.normalize(found.vectors, dim=-1)
        if words:
            assert objective.anchor_attention is not None and objective.key_attention is not None
            anchors, neighbours = objective.anchor_attention(anchors), objective.key_attention(neighbours)
        weights = torch.einsum("bd,bkd->bk", anchors, neighbours).softmax(1) / (2 if words else 1)
        wanted = 0.4 * -(shares[:, 0] + (weights * shares[:, 1:]).sum(1))
        if form == "paper":
            wanted = -(shares[:, 0].exp() + (weights * shares[:, 1:].exp()).sum(1)).log()
        torch.testing.assert_close(loss, wanted)
        loss.sum().backward()
        assert rows["projection_0"].grad is not None and rows["projection_0"].grad.abs().max() > 1e-6
        if words:
            assert all(layer.weight.grad is not None for layer in (objective.anchor_attention, objective.key_attention))


def test_attention_begins_as_the_identity(own: Toy) -> None:
    weights = method_of(recipe_of(own, "objective.attention=linear")).build().anchor_attention.weight
    assert torch.equal(weights, torch.eye(16))


def test_chunks_change_nothing(own: Toy) -> None:
    first, second = build(own), build(own, "objective.chunk=3")
    rows = embedded(first)
    torch.testing.assert_close(first.compare(rows)[0], second.compare(rows)[0])


def test_same_file_is_passed_over(own: Toy) -> None:
    objective = build(own, "objective.exclude_same_file=true")
    rows = embedded(objective)
    objective.queue.enqueue(rows["key_1"], rows["file"])
    found = objective.neighbours(rows["key_1"], rows["file"])
    lengths = (found.vectors - rows["key_1"][:, None]).norm(dim=-1)
    assert found.allowed.all() and float(lengths.min()) > 0
    objective.options.exclude_same_file = False
    again = objective.neighbours(rows["key_1"], rows["file"])
    torch.testing.assert_close(again.vectors[:, 0], rows["key_1"])
    assert not again.random[:, 0].any() and again.random.any()


def test_a_queue_of_one_file_gives_neighbours_that_do_not_count() -> None:
    queue = KeyQueue(5, 3, 0, of_rank=False)
    queue.enqueue(torch.randn(4, 3), torch.full((4,), 7))
    found = queue.neighbours(torch.randn(2, 3), torch.tensor([7, 8]), 3, exclude=True)
    assert found.allowed.tolist() == [[True, False, False], [True] * 3]
    objective_like = SNCLRObjective.counted
    options = type("Options", (), {"threshold": False, "wait_for_queue": False})
    counted = objective_like(type("Own", (), {"options": options})(), torch.full((2, 3), 0.5), found)  # type: ignore[arg-type]
    assert counted.tolist() == [[0.5, 0, 0], [0.5] * 3]


def test_neighbours_wait_for_the_queue(own: Toy) -> None:
    objective = build(own, "objective.wait_for_queue=true")
    rows = embedded(objective)
    loss, shares, found = contrasted(objective, rows)
    torch.testing.assert_close(loss, -0.4 * shares[:, 0])
    assert float(objective.compare(rows)[1]["queue_random"]) == 1
    for number in range(5):
        assert float(objective.compare(rows)[1]["neighbours_random"]) > 0
        objective.queue.enqueue(embedded(objective, number + 1)["key_1"].detach(), rows["file"])
    _, metrics = objective.compare(rows)
    assert float(metrics["queue_random"]) == float(metrics["neighbours_random"]) == 0
    loss, shares, _ = contrasted(objective, rows)
    assert (loss > -0.4 * shares[:, 0] + 1e-3).all()


def test_state_changes_behind_an_update_alone(own: Toy) -> None:
    objective, rows = build(own), None
    before = {name: value.clone() for name, value in objective.named_buffers() if "queue" in name}
    for _ in range(2):
        rows = embedded(objective)
        first, again = objective.compare(rows)[0], objective.compare(rows)[0]
        assert torch.equal(first, again)
    assert all(torch.equal(value, dict(objective.named_buffers())[name]) for name, value in before.items())
    weight = objective.teacher.twin.get_parameter("norm.weight").clone()
    objective.before_step(4, 5, 10)
    objective.after_step()
    assert rows is not None and torch.equal(objective.queue.entries[:4], rows["key_1"]) and objective.queue.pointer == 4
    share = 1 - 0.5 * (1 + np.cos(np.pi * 0.5)) * 0.01
    wanted = share * weight + (1 - share) * objective.model.norm.weight
    torch.testing.assert_close(objective.teacher.twin.get_parameter("norm.weight"), wanted)
    objective.after_step()
    assert objective.queue.pointer == 4, "nothing has arrived since"
    assert set(objective.state_dict()) & {"queue.entries", "queue.files"} == set()


def test_several_micro_batches_are_compared_as_one(own: Toy) -> None:
    objective, batches = build(own), [batch_of(number=number) for number in (0, 1)]
    parts = [objective.embed(batch) for batch in batches]
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    wanted = objective.compare(rows)[0]
    wanted.backward()
    weight = objective.predictor[3].weight
    gradient, weight.grad = weight.grad, None
    cache = open_cache(objective, 2)
    assert cache is not None
    with cache.collecting(objective):
        for batch in batches:
            objective(batch)
    for batch in batches:
        output = objective(batch)
        torch.testing.assert_close(output.loss, wanted)
        (output.loss / 2).backward()
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-6)
    objective.after_step()
    assert objective.queue.pointer == 8 and torch.equal(objective.queue.entries[:8], rows["key_1"])


def test_the_queue_stays_float32_and_comes_from_meta() -> None:
    queue = KeyQueue(6, 4, 3, of_rank=False)
    before = queue.entries.clone()
    assert torch.equal(queue.to(torch.bfloat16).entries, before)
    with torch.device("meta"):
        empty = KeyQueue(6, 4, 3, of_rank=False)
    assert empty.entries.is_meta and torch.equal(empty.to_empty(device="cpu").entries, before)
    assert not empty.past.any() and not torch.equal(KeyQueue(6, 4, 4, of_rank=False).entries, before)
    torch.testing.assert_close(before.norm(dim=1), torch.ones(6))


def test_a_rank_takes_a_queue_over() -> None:
    queue = KeyQueue(6, 4, 3, of_rank=True)
    take = queue.rank_state()["queue"].take
    assert take is not None
    written = [torch.full((6, 4), float(rank)) for rank in range(2)]
    take(written, 3, 4)
    assert torch.equal(queue.entries, written[1])
    take([written[0]], 3, 4)
    assert torch.equal(queue.entries, written[0])
    with pytest.raises(CheckpointError, match=r"found \[5, 4\], this run has \[6, 4\]"):
        take([torch.zeros(5, 4)], 0, 1)


def test_what_decays(own: Toy) -> None:
    for words, groups in (((), 1), (("objective.decay=matrices",), 2)):
        found = parameter_groups(build(own, *words), 0.1)
        assert len(found) == groups
        names = {name for name, value in build(own, *words).named_parameters() if value.requires_grad}
        assert sum(len(group["params"]) for group in found) == len(names)  # type: ignore[arg-type]
        assert not any("teacher" in name or "patch_embed" in name for name in names)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["objective.neighbours=21"], "objective.neighbours: found 21, allowed: up to objective.queue, 20"),
        (["objective.neighbours=-1"], "objective.neighbours: found -1"),
        (["objective.queue=0"], "objective.queue: found 0, allowed: 1 or more"),
        (["objective.temperature=0"], "objective.temperature: found 0"),
        (["objective.momentum=1.5"], "objective.momentum: found 1.5, allowed: 0 to 1"),
        (["objective.attention_scale=-1"], "objective.attention_scale"),
        (["objective.projector_layers=0"], "objective.projector_layers"),
        (["objective.chunk=0"], "objective.chunk: found 0"),
        (["objective.attention=linear", "objective.neighbours=0"], "objective.attention: found linear"),
        (["model.classes=5"], "model.classes: found 5, allowed: 0"),
        (["model.dim=30", "model.heads=5"], "model.dim=30: no multiple of 4"),
        (["input.views=3"], "input.views: found 3, allowed: 2"),
        (["optim.name=lars", "zero.stage=2"], "zero.stage: found 2, allowed with optim.name=lars: 0"),
    ],
)
def test_what_can_not_work_is_refused(own: Toy, words: list[str], expected: str) -> None:
    found = problems_of(method_of(recipe_of(own, *words)))
    assert any(expected in line for line in found), found


def test_what_is_told(own: Toy) -> None:
    assert problems_of(method_of(recipe_of(own))) == [] == warnings_of(method_of(recipe_of(own)))
    half = problems_of(method_of(recipe_of(own, "compute.dtype=bf16", name="resnet")))
    assert any("compute.dtype: found bf16" in line for line in half), half
    lines = warnings_of(method_of(recipe_of(own, "objective.queue=5", "objective.momentum=1")))
    assert any("objective.queue=5 is less than batch.samples=8" in line for line in lines) and len(lines) == 2
    (line,) = warnings_of(method_of(recipe_of(own, "objective.neighbours=0", "objective.threshold=true")))
    assert line.startswith("objective.threshold has no effect")


def test_a_step_is_traced(own: Toy) -> None:
    method = method_of(recipe_of(own))
    assert trace_step(method, 2, on_cpu=True).flops() > 2 * 4 * method.cost().executed


def test_released_layout_and_encoders_alone(own: Toy, tmp_path: Path) -> None:
    for name, head in (("snclr", "head"), ("resnet", "fc")):
        first, second = build(own, name=name), build(own, name=name)
        first.follow(0.9)
        method = method_of(recipe_of(own, name=name))
        formats = method.exports(tmp_path)
        formats["released"].write(first, str(tmp_path / "whole.pth.tar"))
        content = torch.load(tmp_path / "whole.pth.tar", weights_only=True)["state_dict"]
        assert f"module.momentum_encoder.{head}.6.weight" in content
        second.load_pretrained("whole", read_raw(str(tmp_path / "whole.pth.tar")))
        alike = {key: value for key, value in first.state_dict().items() if not key.endswith("updates")}
        assert all(torch.equal(value, second.state_dict()[key]) for key, value in alike.items())
        del content[f"module.predictor.{3}.weight"]
        with pytest.raises(WeightsError, match="3.weight"):
            second.load_pretrained("cut", content)
        formats["official"].write(first, str(tmp_path / "encoder.pth"))
        third = build(own, name=name)
        third.load_pretrained("encoder", read_raw(str(tmp_path / "encoder.pth")))
        for module in (third.model, third.teacher.twin):
            state = module.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in first.model.state_dict().items())
    assert set(torch.load(tmp_path / "encoder.pth", weights_only=True)) >= {"conv1.weight", "layer4.0.bn3.weight"}
    deit = build(own)
    method_of(recipe_of(own)).exports(tmp_path)["official"].write(deit, str(tmp_path / "deit.pth"))
    assert set(torch.load(tmp_path / "deit.pth", weights_only=True)) == {"model"}
    plain = ImageViT(deit.model.options)
    load_weights(plain, str(tmp_path / "deit.pth"))
    pictures = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain(pictures), deit.model(pictures))


def test_views_of_a_resnet_have_statistics_of_their_own(own: Toy) -> None:
    objective, batch = build(own, name="resnet"), batch_of()
    with torch.no_grad():
        apart = objective.embed(batch)
        second = batch["video"].unflatten(0, (-1, 2))[:, 1:].expand(-1, 2, -1, -1, -1, -1).flatten(0, 1)
        both = objective.embed({**batch, "video": second})
    torch.testing.assert_close(apart["projection_1"], both["projection_0"])


def same_state(own: Toy, first: str, second: str) -> None:
    """Weights, momentum encoder and queues of two runs' last checkpoints are equal, bit for bit."""
    folders = [own.folder / name / "checkpoints" / own.checkpoints(name)[-1] for name in (first, second)]
    one, other = (consolidated_state(folder) for folder in folders)
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    for path in sorted((folders[0] / "rank_state").iterdir()):
        ranks = [torch.load(folder / "rank_state" / path.name) for folder in folders]
        assert set(ranks[0]) == {"queue", "queue_files", "queue_pointer"}
        assert all(torch.equal(entry["tensor"], ranks[1][name]["tensor"]) for name, entry in ranks[0].items())


def test_runs_on_two_ranks_go_on_bit_for_bit(own: Toy) -> None:
    """One queue for all: the same training as on one rank. One of each rank: goes on under a rule."""
    kinds = {"all": ["objective.exclude_same_file=true"], "rank": ["objective.queue_of=rank"]}
    runs: dict[str, dict[str, Any]] = {}
    for kind, words in kinds.items():
        first = [f"schedule.max_steps={STEPS_PER_EPOCH}", f"run.dir={own.folder / f'{kind}_halves'}"]
        runs |= {f"{kind}_whole": {"overrides": words}, f"{kind}_begun": {"overrides": [*words, *first]}}
        runs[f"{kind}_halves"] = {"overrides": words}
    assert set(own.drive(runs, ranks=2).values()) == {0}
    for kind in kinds:
        # As killed behind the checkpoint before the last one, and continued on one rank.
        shutil.copytree(own.folder / f"{kind}_whole", own.folder / f"{kind}_moved")
        shutil.rmtree(own.folder / f"{kind}_moved" / "checkpoints" / own.checkpoints(f"{kind}_moved")[-1])
    alone = {f"{kind}_moved": {"overrides": [*words, "batch.micro=8"]} for kind, words in kinds.items()}
    alone["one"] = {"overrides": [*kinds["all"], "batch.micro=8"]}
    assert set(own.drive(alone, ranks=1).values()) == {0}
    for kind in kinds:
        assert own.losses(f"{kind}_whole") == own.losses(f"{kind}_halves")
        assert len(own.losses(f"{kind}_moved")) == 2 * STEPS_PER_EPOCH
        same_state(own, f"{kind}_whole", f"{kind}_halves")
    for name in ("one", "all_moved"):
        torch.testing.assert_close(own.losses(name), own.losses("all_whole"), rtol=1e-3, atol=1e-4)
    assert abs(own.losses("rank_whole")[-1] - own.losses("all_whole")[-1]) > 1e-3
    first, final = own.records("one")[0], own.records("one")[-1]
    assert 0 < final["train/positiveness_entropy"] < 1 < final["train/key_rank"] < 8
    assert 1 / 3 < final["train/positiveness_largest"] < 1 and final["train/neighbours_random"] == 0
    assert (first["train/queue_random"], final["train/queue_random"]) == (1, 0)
    trained = load_trained(own.folder / "one")
    trained.method.exports(trained.source)["safetensors"].write(trained.objective, str(own.folder / "out"))
    again = load_trained(own.folder / "out").objective
    state = again.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in trained.objective.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet", ["optim.name=lars", "optim.base_lr=0.6", "objective.decay=matrices"]),
        ("clips", ["input.frames=4", "input.stride=1", "objective.form=paper", "objective.attention=linear"]),
    ],
)
def test_other_encoders_train(own: Toy, toy: Any, name: str, words: list[str]) -> None:
    other = dataclasses.replace(own, recipe=own.folder / f"{name}.yaml")
    health = [f"health.shards={toy.folder / 'shards'}", "health.every_epochs=1", "health.neighbours=5"]
    found = other.drive({name: {"overrides": ["batch.micro=8", "schedule.max_steps=5", *health, *words]}}, ranks=1)
    assert set(found.values()) == {0}
    assert any("health/knn_top1" in record for record in other.records(name))


@pytest.mark.faults
def test_a_killed_run_goes_on(own: Toy) -> None:
    """Two ranks under the launcher, kill -9 behind the first checkpoint, the same command again."""
    own.train("untouched", ranks=2)
    process = own.start("killed", ranks=2)
    own.wait_for("killed", STEPS_PER_EPOCH, process)
    own.kill(process)
    own.train("killed", ranks=2)
    assert own.losses("killed")[-4:] == own.losses("untouched")[-4:]
    same_state(own, "untouched", "killed")
