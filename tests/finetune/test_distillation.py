"""Distillation: the same views for both, a teacher that is nobody's parameter, and a cache that is right or refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.commands.finetune import main
from finetune.distillation.logit_cache import HEADER, LogitCache, views_digest
from finetune.distillation.task import DistillationObjective, distillation_loss
from finetune.recipe import TuneRecipe, load_tune_recipe
from pretrain.checkpoint.consolidate import consolidated_state
from pretrain.errors import DataError, TrainingError, WeightsError
from pretrain.models import classifier
from pretrain.objectives.base import method_of
from pretrain.runtime.tensors import weights_digest

SHAPE = {"patch_size": 16, "dim": 48, "depth": 2, "heads": 2, "mlp_ratio": 2, "classes": 3, "positions": "rebuild"}


def words_for(weights: Path) -> list[str]:
    """Overrides that make the toy recipe a distillation from a teacher of the toy recipe's shape."""
    model = [f"objective.teacher.model.{key}={value}" for key, value in SHAPE.items()]
    options = [f"objective.teacher.weights={weights}", "objective.teacher.dtype=fp32"]
    return ["objective.name=distillation", "objective.teacher.model.size=custom", *options, *model]


def network(seed: int, **other: Any) -> classifier.VideoClassifier:
    torch.manual_seed(seed)
    config = classifier.Config(**{"size": "custom", "head_init_scale": 1, **SHAPE, **other})
    return classifier.VideoClassifier(config, 4, 32, 32)


@pytest.fixture
def recipe(toy: Any, tmp_path: Path) -> TuneRecipe:
    torch.save(network(0).state_dict(), tmp_path / "teacher.pth")
    return load_tune_recipe(str(toy.recipe), words_for(tmp_path / "teacher.pth"))


def build(recipe: TuneRecipe) -> DistillationObjective:
    objective = method_of(recipe).build()
    assert isinstance(objective, DistillationObjective)
    return objective


def batch_of(clips: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    return {
        "video": torch.randint(256, (clips, 4, 32, 32, 3), generator=generator, dtype=torch.uint8),
        "target": torch.arange(clips) % 3,
        "epoch": torch.zeros(clips, dtype=torch.int64),
        "position": torch.arange(clips),
        "view": torch.zeros(clips, dtype=torch.int64),
        "key": [str(n) for n in range(clips)],
    }


def test_loss_is_the_divergence_from_the_teacher() -> None:
    student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 3.0, 1.0]])
    for temperature in (1.0, 4.0):
        p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
        expected = (p * (p / q).log()).sum() * temperature**2
        torch.testing.assert_close(distillation_loss(student, teacher, temperature), expected)
    assert distillation_loss(student.repeat(5, 1), teacher.repeat(5, 1), 1) == pytest.approx(
        float(distillation_loss(student, teacher, 1)), rel=1e-6
    )


def test_student_and_teacher_see_the_same_mixed_views(recipe: TuneRecipe) -> None:
    objective = build(recipe).train()
    objective.model.load_state_dict(network(0).state_dict())
    assert objective.mixing is not None
    torch.manual_seed(3)
    twin = objective(batch_of())
    assert float(twin.loss.detach()) == pytest.approx(0, abs=1e-6) and float(twin.metrics["agreement"]) == 100
    objective.model.load_state_dict(network(1).state_dict())
    torch.manual_seed(3)
    assert float(objective(batch_of()).loss.detach()) > 1e-3


def test_teacher_is_frozen_and_no_part_of_the_student(recipe: TuneRecipe) -> None:
    objective = build(recipe).train()
    names = [name for name, _ in objective.named_parameters()]
    objective(batch_of()).loss.backward()
    assert [name for name, _ in objective.named_parameters()] == names
    assert not any("teacher" in name for name in objective.state_dict())
    teacher = objective.teacher._model
    assert teacher is not None and not teacher.training
    assert all(not value.requires_grad and value.grad is None for value in teacher.parameters())
    assert all(value.grad is not None for value in objective.model.parameters())


def test_loading_the_teacher_changes_no_draw(recipe: TuneRecipe) -> None:
    objective = build(recipe).train()
    after = []
    for _ in range(2):
        torch.manual_seed(3)
        objective(batch_of())
        after.append(float(torch.rand(())))
    assert after[0] == after[1]


def test_labels_take_their_share(recipe: TuneRecipe) -> None:
    losses = {}
    for weight in (0.0, 0.25, 1.0):
        recipe.objective.label_weight = weight
        objective = build(recipe).train()
        objective.model.load_state_dict(network(1).state_dict())
        torch.manual_seed(3)
        losses[weight] = float(objective(batch_of()).loss.detach())
    assert losses[0.25] == pytest.approx(0.75 * losses[0.0] + 0.25 * losses[1.0], rel=1e-5)
    assert abs(losses[0.0] - losses[1.0]) > 0.1


@pytest.mark.parametrize("other", [{"classes": 5}, {"classes": 0}])
def test_teacher_without_the_right_head_is_refused(recipe: TuneRecipe, tmp_path: Path, other: dict[str, int]) -> None:
    torch.save(network(0, **other).state_dict(), tmp_path / "teacher.pth")
    with pytest.raises(WeightsError, match="head.weight"):
        build(recipe).train()(batch_of())


def test_cache_gives_back_what_was_written(tmp_path: Path) -> None:
    cache = LogitCache(tmp_path, {"seed": 0}, 0, 2, (4, 3))
    views, logits = views_digest(batch_of()), torch.randn(4, 3) * 10
    assert cache.read(1001, 1, views) is None
    stored = cache.write(1001, 1, views, logits)
    assert torch.equal(stored, logits.half().float())
    again = LogitCache(tmp_path, {"seed": 0}, 0, 2, (4, 3))
    found = again.read(1001, 1, views)
    assert found is not None and torch.equal(found, stored)
    for step, micro in ((1001, 0), (1002, 0), (1000, 0), (1, 1)):
        assert again.read(step, micro, views) is None, "never written"
    with pytest.raises(TrainingError, match="float16"):
        cache.write(0, 0, views, torch.full((4, 3), 1e6))


def test_cache_refuses_other_views_and_other_runs(tmp_path: Path) -> None:
    cache = LogitCache(tmp_path, {"seed": 0, "augment": {"area": (0.5, 1.0)}}, 0, 1, (4, 3))
    batch = batch_of()
    torch.manual_seed(1)
    views = views_digest(batch)
    cache.write(0, 0, views, torch.randn(4, 3))
    torch.manual_seed(2)
    others = [views_digest(batch)]  # mixed otherwise
    torch.manual_seed(1)
    for name in ("epoch", "position", "view"):
        others.append(views_digest(batch | {name: batch[name] + 1}))
    others.append(views_digest(batch | {"key": ["0", "1", "2", "substitute"]}))
    others.append(views_digest(batch | {"mix_seeds": [7, 8]}))
    assert views_digest(batch_of()) == views and len({views, *others}) == 7
    for other in others:
        with pytest.raises(DataError, match="other clips"):
            cache.read(0, 0, other)
    with pytest.raises(DataError, match=r"augment.area: \[0.5, 1.0\] there, \[0.1, 1.0\] here"):
        LogitCache(tmp_path, {"seed": 0, "augment": {"area": (0.1, 1.0)}}, 1, 1, (4, 3))


def test_torn_record_is_computed_again(tmp_path: Path) -> None:
    cache, views = LogitCache(tmp_path, {}, 0, 1, (4, 3)), views_digest(batch_of())
    cache.write(0, 0, views, torch.randn(4, 3))
    cache.write(1, 0, views, torch.randn(4, 3))
    path = tmp_path / "rank_00000" / "step_00000000.bin"
    whole, record = path.read_bytes(), HEADER.size + 24
    assert len(whole) == 2 * record
    path.write_bytes(whole[:record] + whole[record : record + 30] + bytes(record - 30))
    assert cache.read(0, 0, views) is not None and cache.read(1, 0, views) is None
    path.write_bytes(whole[: record - 4])
    assert cache.read(0, 0, views) is None


def test_digest_of_weights_is_of_their_values() -> None:
    state = network(0).bfloat16().state_dict()
    assert weights_digest(state) == weights_digest(dict(reversed(list(state.items()))))
    assert weights_digest(state) != weights_digest(network(1).bfloat16().state_dict())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["objective.temperature=0"], "objective.temperature"),
        (["objective.label_weight=2"], "a share from 0 to 1"),
        (["objective.cache=s3://bucket/logits"], "allowed: a folder"),
        (["objective.teacher.model.classes=4"], "must have the same classes"),
        (["objective.teacher.model.patch_size=24"], "objective.teacher"),
        (["objective.task=multi"], "allowed: single"),
    ],
)
def test_what_can_not_work_is_refused(
    toy: Any, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--recipe", str(toy.recipe), "--check", *words_for(Path("teacher.pth")), *words]) == 2
    assert expected in capsys.readouterr().err


def test_teacher_must_be_named(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", str(toy.recipe), "--check", "objective.name=distillation"]) == 2
    assert "objective.teacher.weights" in capsys.readouterr().err


def losses(toy: Any, name: str) -> list[float]:
    return [record["train/loss"] for record in toy.records(name) if "train/loss" in record]


def test_runs_with_and_without_cache(toy: Any) -> None:
    """A run that stops and goes on fills the cache; an uninterrupted one then needs no teacher and learns the same."""
    short = ("evaluate.every_epochs=9", "evaluate.test=none")
    toy.run("teacher", *short, "schedule.max_steps=2")
    student = [*words_for(toy.folder / "teacher"), *short, "model.dim=24", "model.depth=1", "schedule.max_steps=4"]
    cache = f"objective.cache={toy.folder / 'logits'}"
    parts = toy.run("pupil", *student, cache, "schedule.max_steps=2") + toy.run("pupil", *student, cache)
    assert parts.count("frozen, in fp32") == 2
    whole = toy.run("pupil_at_once", *student, cache)
    assert "frozen, in fp32" not in whole, "the teacher did not run again"
    assert losses(toy, "pupil_at_once") == losses(toy, "pupil") and len(losses(toy, "pupil")) == 4
    toy.run("uncached", *student)
    np.testing.assert_allclose(losses(toy, "uncached"), losses(toy, "pupil"), rtol=1e-2)
    refused = toy.run("refused", *student, cache, "augment.erasing=0", expect=1)
    assert "augment.erasing: 0.25 there, 0.0 here" in refused
    state = consolidated_state(toy.folder / "pupil" / "checkpoints" / "step_00000004")
    assert state and all(name.startswith("model.") for name in state)
