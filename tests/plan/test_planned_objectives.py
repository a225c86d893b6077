"""What objectives do beside forward, backward and update: plans count it, where a recipe asks for it."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn

from pretrain.data.samples import Batch
from pretrain.errors import RecipeError
from pretrain.models.cubes import cut_cubes, take_tokens
from pretrain.models.frozen import Frozen
from pretrain.objectives.base import Objective, Output, Rule, WholeBatchObjective
from pretrain.objectives.videomae import VideoMAEMethod
from pretrain.plan.dry_run import dry_run
from pretrain.plan.estimate import Planner
from pretrain.plan.feeding import Resources
from pretrain.plan.hardware import SHEETS
from pretrain.plan.trace import trace_step
from pretrain.recipe.load import load_recipe
from pretrain.runtime.gradient_cache import Embeddings

WORDS = "batch.samples=16 batch.micro=4 batch.ranks=2 compute.dtype=bf16 zero.bucket_mb=1".split()
#: Elements of one of the demo's cubes, and parameters of a tower that maps them.
DIM, TOWER = 384, 384 * 4000 + 4000


def features(model: Any, batch: Batch) -> Tensor:
    """Features of the cubes to be predicted, bfloat16 [B, DIM]."""
    cubes = cut_cubes(batch["video"], model.shape.tubelet, model.shape.patch_size)
    seen: Tensor = model(take_tokens(cubes, batch["visible"]), batch["visible"], batch["targets"]).mean(1)
    return seen


class Contrast(WholeBatchObjective):
    """A loss over the global batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def embed(self, batch: Batch) -> Embeddings:
        return {"rows": features(self.model, batch)}

    def compare(self, embeddings: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        return embeddings["rows"].float().square().mean(), {}


class Accumulated(Contrast):
    """The same with two turns, which no cache can hold."""

    turns = ("one", "other")

    def rule(self, name: str, shape: Iterable[int]) -> Rule:
        return replace(super().rule(name, shape), turn="one" if "encoder" in name else "other")


class Beside(Objective):
    """Features compared with a frozen tower's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.head = nn.Linear(DIM, 4000)
        self.tower = Frozen("objective.tower", "/nowhere/tower.pth", lambda: nn.Linear(DIM, 4000), _unreadable)

    def frozen_parts(self) -> dict[str, Frozen[Any]]:
        return {"tower": self.tower}

    def forward(self, batch: Batch) -> Output:
        seen = features(self.model, batch)
        return Output((self.head(seen) - self.tower(seen)).float().square().mean(), {})


def _unreadable(tower: nn.Module, place: str) -> None:
    raise AssertionError(f"{place}: a plan reads no weights")


def method(kind: Any, *words: str) -> VideoMAEMethod:
    """A method on the demo's model and clips whose objective is of another kind."""

    class Other(VideoMAEMethod):
        def build(self) -> Any:
            return kind(self.architecture.build(self.recipe.compute.activation_checkpointing))

    return Other(load_recipe("demo", [*WORDS, *words]))


def plan(kind: Any, *words: str) -> Any:
    # Without a network nothing is hidden, and kernels take no least time: seconds are those of the work.
    gpu = replace(SHEETS["h100"], link_gbs=0.0)
    return Planner(method(kind, *words), gpu, Resources(), [], None).estimate(2)


def rows(kind: Any, title: str, *words: str) -> dict[str, tuple[str, str]]:
    found = next(section for section in dry_run(method(kind, *words)) if section.title.startswith(title))
    return {name.strip(): (value, remark) for name, value, remark in found.rows}


def test_every_micro_batch_of_a_whole_batch_loss_is_embedded_once_more() -> None:
    cached, whole = plan(Contrast, "zero.stage=3"), plan(Contrast, "zero.stage=3", "batch.micro=8")
    assert (cached.accumulation, whole.accumulation) == (2, 1)
    assert cached.times.forward == pytest.approx(2 * whole.times.forward, rel=0.05)
    assert cached.times.backward == pytest.approx(whole.times.backward, rel=0.05)
    assert cached.mfu < whole.mfu, "the second forward pass is not the model's own work"
    assert cached.traffic.weights == 2 * 3 / 2 * whole.traffic.weights, "stage 3 gathers weights for it, too"
    assert "x 4 passes x" in rows(Contrast, "one optimiser step")["work"][1]
    assert "x 3 passes x" in rows(Contrast, "one optimiser step", "batch.micro=8")["work"][1]


def test_a_whole_batch_loss_that_can_not_be_cached_is_refused_as_in_training() -> None:
    for look in (plan, lambda kind: rows(kind, "memory")):
        with pytest.raises(RecipeError, match="it would be another loss. Raise batch.micro"):
            look(Accumulated)


@pytest.mark.parametrize("stage", [0, 3])
def test_frozen_towers_are_counted_once_from_their_footprint(stage: int) -> None:
    found = plan(Beside, f"zero.stage={stage}")
    shards = 2 if stage == 3 else 1
    assert found.memory.weights == pytest.approx(2 * found.parameters / shards + 2 * TOWER), "bf16, whole on each rank"
    assert found.checkpoint_bytes < 2 * found.parameters + 16 * TOWER
    said = rows(Beside, "memory", f"zero.stage={stage}")["tower"]
    assert said == (f"{2 * TOWER / 1e6:.1f} MB", f"{TOWER:,} parameters in bf16: frozen, whole on each rank")


def test_the_parts_of_an_objective_add_up() -> None:
    found = rows(Beside, "model")
    assert found["head"] == (f"{TOWER:,}", "beside the model") and found["encoder"][1] == ""
    counts = {name: int(value.replace(",", "")) for name, (value, _) in found.items()}
    assert counts.pop("parameters") == sum(count for name, count in counts.items() if name != "trained")


def test_a_trace_takes_no_memory_for_a_tower_and_reads_none() -> None:
    chosen = method(Beside)
    objective = chosen.build()
    built: list[Any] = []
    objective.tower._build = lambda: built.append(nn.Linear(DIM, 4000)) or built[-1]
    chosen.build = lambda: objective  # type: ignore[method-assign]
    assert trace_step(chosen, 2).forward_flops > 0
    assert built and all(type(part.weight.data).__name__ == "FakeTensor" for part in built)


def test_frozen_weights_have_no_share_in_the_backward_pass_that_mfu_counts() -> None:
    trace = trace_step(method(Beside), 2)
    # The head alone is trained, and nothing before it needs a gradient.
    head = 2 * trace.clips * DIM * 4000
    assert trace.model_flops == trace.forward_flops + head


def test_recomputed_work_is_none_of_the_models() -> None:
    kept, recomputed = (
        trace_step(method(Contrast, f"compute.activation_checkpointing={word}"), 2) for word in ("false", "true")
    )
    assert recomputed.flops() > 1.2 * kept.flops()
    assert recomputed.model_flops == kept.model_flops > 2.8 * kept.forward_flops
