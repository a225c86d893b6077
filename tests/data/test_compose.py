"""Sources mixed, in turn, or side by side: which samples make a step, for any number of ranks and from any step."""

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.compose import epoch_size
from pretrain.data.index import Shard, ShardIndex, ShardTable
from pretrain.data.samples import Place
from pretrain.data.stream_plan import OpenSource, StreamPlan
from pretrain.errors import DataError
from pretrain.guards.results import StepResult
from pretrain.guards.step_guard import StepGuard
from pretrain.objectives.base import method_of, problems_of
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Guard, Recipe, Source

SIZES = {"long": (9, 8, 7), "short": (5, 4)}


def recipe_of(compose: str, epoch_samples: int | None = None) -> Recipe:
    words = [f"data.compose={compose}", "data.lanes=2", "data.shuffle_window=4", "batch.samples=4", "batch.micro=2"]
    recipe = load_recipe("demo", words)
    sources = {name: Source(shards=name) for name in SIZES}
    return replace(recipe, data=replace(recipe.data, sources=sources, epoch_samples=epoch_samples))


def plan_of(recipe: Recipe, sizes: dict[str, tuple[int, ...]] = SIZES) -> StreamPlan:
    sources = []
    for name, counts in sizes.items():
        table = ShardTable(Shard(f"{name}-{i}.tar", count, 1000, "0" * 64) for i, count in enumerate(counts))
        sources.append(OpenSource(name, ShardIndex(name, table), Source(shards=name)))
    return StreamPlan(recipe.data, recipe.batch, recipe.run.seed, sources)


def step_of(plan: StreamPlan, step: int, world_size: int) -> list[Place]:
    """The samples of a step, all ranks' micro-batches together, in the order of positions."""
    parts = plan.accumulation(world_size)
    places = [
        place
        for rank in range(world_size)
        for part in range(parts)
        for place in plan.places(step * parts + part, rank, world_size)
    ]
    return sorted(places, key=lambda place: (place.source, place.position))


@pytest.mark.parametrize("compose", ["mixed", "alternate", "together"])
def test_a_step_is_the_same_for_any_number_of_ranks(compose: str) -> None:
    plan = plan_of(recipe_of(compose))
    for step in range(3 * plan.steps_per_epoch):
        assert step_of(plan, step, 1) == step_of(plan, step, 2)


@pytest.mark.parametrize("compose", ["mixed", "alternate", "together"])
def test_in_blocks_a_micro_batch_is_the_same_for_any_number_of_ranks(compose: str) -> None:
    plan = plan_of(recipe_of(compose))
    for step in range(3 * plan.steps_per_epoch):
        dealt = {}
        for ranks in (1, 2):
            parts = plan.accumulation(ranks)
            numbers = [(step * parts + part, rank) for part in range(parts) for rank in range(ranks)]
            dealt[ranks] = [plan.places(number, rank, ranks, in_blocks=True) for number, rank in numbers]
        assert dealt[1] == dealt[2] and len(dealt[1]) == 2
        whole = sorted((place for places in dealt[1] for place in places), key=lambda place: place.position)
        assert whole == sorted(step_of(plan, step, 1), key=lambda place: place.position)


@pytest.mark.parametrize("compose", ["mixed", "alternate", "together"])
def test_a_plan_arrives_in_a_data_worker_as_it_was(compose: str) -> None:
    plan = plan_of(recipe_of(compose))
    arrived = pickle.loads(pickle.dumps(plan))
    for step in range(2 * plan.steps_per_epoch):
        assert step_of(arrived, step, 1) == step_of(plan, step, 1)


def test_alternating_sources_take_turns_and_smaller_ones_begin_again() -> None:
    plan = plan_of(recipe_of("alternate"))
    # 24 samples of the larger source in 2 lanes are 6 steps; the smaller one has as many.
    assert plan.steps_per_epoch == 12
    for step in range(24):
        assert {place.source for place in step_of(plan, step, 1)} == {step % 2} == {plan.composition.source_of(step)}
    seen = Counter((p.source, p.shard, p.row) for step in range(12) for p in step_of(plan, step, 1))
    assert all(seen[0, shard, row] == 1 for shard, count in enumerate(SIZES["long"]) for row in range(count))
    short = [count for (source, _, _), count in seen.items() if source == 1]
    assert sum(short) == 24 and set(short) <= {2, 3} and len(short) == 9


def test_sources_side_by_side_give_a_sample_each() -> None:
    recipe = recipe_of("together")
    plan = plan_of(recipe)
    assert plan.steps_per_epoch == 6 and plan.samples_per_micro == 4
    micro = plan.places(0, 0, 2)
    assert [place.source for place in micro] == [0, 0, 1, 1], "one source after the other"
    assert len({place.position for place in micro}) == 4, "no two sources share their random numbers"
    assert plan.composition.source_of(3) is None


@pytest.mark.parametrize(("compose", "turns"), [("alternate", 2), ("together", 1)])
def test_sources_of_one_shape_do_not_walk_in_lockstep(compose: str, turns: int) -> None:
    recipe = recipe_of(compose)
    recipe = replace(recipe, data=replace(recipe.data, shuffle_window=64))
    plan = plan_of(recipe, {"photos": (24,), "paintings": (24,)})
    met: list[tuple[int, int]] = []
    for step in range(0, 2 * plan.steps_per_epoch, turns):
        places = [place for turn in range(turns) for place in step_of(plan, step + turn, 1)]
        rows = [[place.row for place in places if place.source == source] for source in (0, 1)]
        met += zip(*rows, strict=True)
    assert len(met) == 48 and len(set(met[:24]) & set(met[24:])) < 8, "other partners in the second epoch"
    assert sum(one == other for one, other in met) < 12


def test_the_order_of_mixed_sources_stays() -> None:
    """Runs that were begun go on with it."""
    places = [place for step in range(2) for place in step_of(plan_of(recipe_of("mixed")), step, 1)]
    first = [(0, 1, 2), (0, 0, 8), (0, 1, 0), (1, 0, 0), (0, 1, 1), (0, 1, 3), (1, 0, 2), (1, 0, 1)]
    assert [(place.source, place.shard, place.row) for place in places] == first


@pytest.mark.parametrize("compose", ["mixed", "alternate", "together"])
def test_a_position_knows_its_step(compose: str) -> None:
    plan = plan_of(recipe_of(compose))
    for step in (0, 1, plan.steps_per_epoch - 1, plan.steps_per_epoch, 2 * plan.steps_per_epoch + 3):
        for place in step_of(plan, step, 1):
            assert plan.composition.step_of(place.epoch, place.position) == step


@pytest.mark.parametrize("compose", ["mixed", "alternate", "together"])
@pytest.mark.parametrize("epoch_samples", [None, 21])
def test_a_dry_run_counts_what_the_stream_will_serve(compose: str, epoch_samples: int | None) -> None:
    recipe = recipe_of(compose, epoch_samples)
    plan = plan_of(recipe)
    served, steps = epoch_size(recipe.data, [sum(counts) for counts in SIZES.values()], recipe.batch.samples)
    assert (served, steps) == (plan.composition.positions, plan.steps_per_epoch)


@pytest.mark.parametrize(("compose", "needed"), [("mixed", 30), ("alternate", 60), ("together", 30)])
def test_what_an_error_advises_works(compose: str, needed: int) -> None:
    recipe = recipe_of(compose)
    recipe = replace(recipe, data=replace(recipe.data, lanes=30, epoch_samples=needed - 1))
    with pytest.raises(DataError, match=f"data.epoch_samples to at least {needed}"):
        plan_of(recipe)
    recipe.data.epoch_samples = needed
    assert plan_of(recipe).steps_per_epoch > 0


def test_substitutes_stay_in_their_source() -> None:
    plan = plan_of(recipe_of("together"))
    for place in plan.places(0, 0, 1):
        for attempt in range(1, 6):
            shard, row = plan.composition.order_of(place).substitute(place.source, place.position, attempt)
            counts = list(SIZES.values())[place.source]
            assert shard < len(counts) and row < counts[shard]


def test_weights_and_single_sources_are_refused(tmp_path: Path) -> None:
    recipe = recipe_of("alternate")
    recipe.data.sources["long"].weight = recipe.data.sources["short"].weight = 1.0
    assert any("have a weight" in problem for problem in problems_of(method_of(recipe)))
    alone = replace(recipe, data=replace(recipe.data, sources={"long": Source(shards="long")}, compose="together"))
    assert any("needs two sources" in problem for problem in problems_of(method_of(alone)))


def test_each_source_is_judged_by_its_own_losses() -> None:
    guard = StepGuard(Guard(window=8, z=5.0))
    rng = np.random.default_rng(0)
    for step in range(1, 17):
        source, level = ("easy", 1.0) if step % 2 else ("hard", 50.0)
        loss = level + 0.01 * float(rng.standard_normal())
        assert guard.limit(source).spike(loss) is None, "the harder source is no spike of the easier one"
        assert guard.decide(step, StepResult({"loss": loss}, {source: loss})) is None
    assert guard.limit("easy").spike(50.0) is not None and guard.limit("hard").spike(50.0) is None
    restored = StepGuard(Guard(window=8, z=5.0))
    restored.state = type(guard.state)(**json.loads(json.dumps(guard.saved())))
    assert restored.limit("easy").spike(50.0) is not None, "the histories are in checkpoints"
