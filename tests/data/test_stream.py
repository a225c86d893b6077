"""The stream: one order for any number of ranks and workers, exact resume, substitutes, errors."""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pretrain.data.bad_samples import BadSampleLedger
from pretrain.data.compose import shares
from pretrain.data.stream_plan import open_plan, open_sources
from pretrain.engine.prefetch import Prefetcher
from pretrain.errors import DataError, RecipeError
from pretrain.recipe.schema import Recipe, Source
from pretrain.samples import sampling
from pretrain.samples.clip import ClipSamples
from tests.streams import training_stream

MakeRecipe = Callable[..., Recipe]
Batches = list[dict[str, Any]]


def take(recipe: Recipe, steps: int, rank: int = 0, world: int = 1, start: int = 0) -> Batches:
    """The micro-batches of one rank in some optimiser steps."""
    opened = training_stream(recipe, rank, world, start)
    batches = list(itertools.islice(opened, steps * opened.accumulation))
    opened.close()
    return batches


def clips(batches: Batches) -> dict[tuple[int, int, int], dict[str, Any]]:
    """Every clip by (epoch, position, view), with all that the batches say of it."""
    found = {}
    for batch in batches:
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        for i, key in enumerate(batch["key"]):
            clip = {name: value[i] for name, value in tensors.items()} | {"key": key}
            place = (int(clip["epoch"]), int(clip["position"]), int(clip["view"]))
            assert place not in found
            found[place] = clip
    return found


def assert_same(found: dict[Any, dict[str, Any]], expected: dict[Any, dict[str, Any]]) -> None:
    assert found.keys() == expected.keys()
    for place, clip in expected.items():
        assert found[place]["key"] == clip["key"]
        for name, value in clip.items():
            assert name == "key" or torch.equal(found[place][name], value), (place, name)


@pytest.fixture(scope="module")
def reference(two_sources: dict[str, str]) -> dict[str, Any]:
    """Filled by the first test that needs it: ten steps of one rank without workers."""
    return {}


def recipe_of(make_recipe: MakeRecipe, two_sources: dict[str, str], **data: Any) -> Recipe:
    sources = {"a": Source(shards=two_sources["a"]), "b": Source(shards=two_sources["b"], stride=1)}
    return make_recipe(sources, **{"views": 2, **data})


@pytest.fixture
def ten_steps(reference: dict[str, Any], make_recipe: MakeRecipe, two_sources: dict[str, str]) -> Batches:
    if not reference:
        reference["batches"] = take(recipe_of(make_recipe, two_sources), steps=10)
    batches: Batches = reference["batches"]
    return batches


def test_batch_holds_what_the_engine_is_promised(ten_steps: Batches) -> None:
    batch = ten_steps[0]
    assert batch["video"].shape == (4, 8, 32, 32, 3) and batch["video"].dtype == torch.uint8
    assert batch["view"].tolist() == [0, 1, 0, 1]
    assert batch["position"].tolist() == [0, 0, 1, 1]
    assert [batch[name].dtype for name in ("visible", "targets", "weight")] == [torch.int64, torch.int64, torch.float32]
    assert len(batch["key"]) == 4 and batch["bad"] == []
    views = batch["video"].reshape(2, 2, 8, 32, 32, 3)
    assert not torch.equal(views[:, 0], views[:, 1]), "crops differ between views"
    assert not torch.equal(batch["visible"][0], batch["visible"][1]), "masks differ between views"


def test_each_sample_once_an_epoch(ten_steps: Batches) -> None:
    """36 samples, 4 steps of 8 an epoch: 32 different keys in each of two epochs, and a third has begun."""
    found = clips(ten_steps)
    for epoch in (0, 1):
        keys = [clip["key"] for (e, _, view), clip in found.items() if e == epoch and view == 0]
        assert len(keys) == 32 and len(set(keys)) == 32
        assert {position for e, position, _ in found if e == epoch} == set(range(32))
    assert len({position for e, position, _ in found if e == 2}) == 16
    orders = [[c["key"] for (e, _, view), c in found.items() if e == epoch and view == 0] for epoch in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_sees_the_same_global_batches(
    world: int, ten_steps: Batches, make_recipe: MakeRecipe, two_sources: dict[str, str]
) -> None:
    recipe = recipe_of(make_recipe, two_sources)
    ranks = [take(recipe, steps=5, rank=rank, world=world) for rank in range(world)]
    for step in range(5):
        per_step = len(ranks[0]) // 5
        served = [batch for batches in ranks for batch in batches[step * per_step : (step + 1) * per_step]]
        assert_same(clips(served), clips(ten_steps[step * 4 : step * 4 + 4]))


@pytest.mark.parametrize("start", [1, 3, 4, 9])
def test_resume_at_any_step(
    start: int, ten_steps: Batches, make_recipe: MakeRecipe, two_sources: dict[str, str]
) -> None:
    batches = take(recipe_of(make_recipe, two_sources), steps=1, start=start)
    assert_same(clips(batches), clips(ten_steps[start * 4 : start * 4 + 4]))


def test_a_thread_that_is_one_ahead_changes_nothing(
    ten_steps: Batches, make_recipe: MakeRecipe, two_sources: dict[str, str]
) -> None:
    """Ranks with an accelerator: the thread starts the workers, and a resumed run has what was given out, no more."""
    for start, workers in ((0, 0), (2, 1)):
        opened = training_stream(recipe_of(make_recipe, two_sources, workers=workers), start=start)
        ahead = Prefetcher(opened, lambda: dict)
        assert_same(clips(list(itertools.islice(ahead, 8))), clips(ten_steps[start * 4 : start * 4 + 8]))
        ahead.close()
        opened.close()


def test_workers_change_nothing(make_recipe: MakeRecipe, two_sources: dict[str, str]) -> None:
    """On the second of two ranks, across the border of two epochs, micro-batch by micro-batch in the same order."""
    found, right = (
        take(recipe_of(make_recipe, two_sources, workers=workers), steps=3, rank=1, world=2, start=3)
        for workers in (1, 0)
    )
    for one, other in zip(found, right, strict=True):
        assert_same(clips([one]), clips([other]))
        assert one["position"].tolist() == other["position"].tolist()
        memory = {value.untyped_storage().data_ptr() for value in one.values() if isinstance(value, torch.Tensor)}
        assert len(memory) == 1, "a batch comes as one piece of shared memory"


#: Ranks and workers of the stretches of one run that stops and goes on elsewhere.
STRETCHES = [(1, 0), (1, 2), (4, 0), (2, 1), (2, 0)]


def test_a_run_that_moves_between_ranks_and_workers_sees_the_same_global_batches(
    make_recipe: MakeRecipe, two_sources: dict[str, str]
) -> None:
    """Two steps on each in epochs of three, so that borders of epochs lie inside the stretches and between them.

    Where one rank has all workers, micro-batch by micro-batch in the same order, too.

    Bit for bit and step by step: keys, pixels (which say where clip and crop lie), masks.
    """
    expected = take(recipe_of(make_recipe, two_sources, epoch_samples=24), steps=2 * len(STRETCHES))
    assert {int(batch["epoch"][0]) for batch in expected} == set(range(4))
    for number, (world, workers) in enumerate(STRETCHES):
        recipe = recipe_of(make_recipe, two_sources, epoch_samples=24, workers=workers)
        start = 2 * number
        ranks = [take(recipe, steps=2, rank=rank, world=world, start=start) for rank in range(world)]
        per_step = 4 // world
        for step in range(2):
            served = [batch for batches in ranks for batch in batches[step * per_step : (step + 1) * per_step]]
            right = expected[(start + step) * 4 : (start + step + 1) * 4]
            assert_same(clips(served), clips(right))
            if world == 1:
                assert [batch["position"].tolist() for batch in served] == [b["position"].tolist() for b in right]


def test_seed_changes_order_and_crops(make_recipe: MakeRecipe, two_sources: dict[str, str]) -> None:
    one, other = (take(make_recipe(two_sources, seed=seed), steps=1) for seed in (0, 1))
    assert [b["key"] for b in one] != [b["key"] for b in other]


def test_stride_belongs_to_the_source(
    ten_steps: Batches, make_recipe: MakeRecipe, two_sources: dict[str, str], frame_number: Callable[..., int]
) -> None:
    """Frames carry their number; the centre crop keeps it readable."""
    recipe = recipe_of(make_recipe, two_sources, crop="center", width=64, height=48, views=1, frames=4)
    for batch in take(recipe, steps=4):
        for video, source in zip(batch["video"].numpy(), batch["source"].tolist(), strict=True):
            numbers = [frame_number(frame) for frame in video]
            assert numbers == sampling.clip_frames(24, 4, [2, 1][source], numbers[0]).tolist()


def test_clip_starts_are_uniform_and_shared_by_views(
    make_recipe: MakeRecipe, two_sources: dict[str, str], frame_number: Callable[..., int]
) -> None:
    recipe = make_recipe(two_sources, crop="center", width=64, height=48, views=2, frames=4, stride=5)
    starts = []
    for batch in take(recipe, steps=8):
        numbers = [frame_number(video[0]) for video in batch["video"].numpy()]
        assert numbers[0::2] == numbers[1::2]
        starts += numbers[0::2]
    assert set(starts) == set(range(5)), "24 frames, 4 x 5: five starts"


def test_weights_and_epoch_samples(make_recipe: MakeRecipe, two_sources: dict[str, str]) -> None:
    sources = {"a": Source(shards=two_sources["a"], weight=1), "b": Source(shards=two_sources["b"], weight=3)}
    recipe = make_recipe(sources, epoch_samples=32)
    found = clips(take(recipe, steps=8))
    for epoch in (0, 1):
        assert Counter(int(c["source"]) for (e, *_), c in found.items() if e == epoch) == {0: 8, 1: 24}
    b = Counter(clip["key"] for clip in found.values() if clip["source"] == 1)
    assert max(b.values()) - min(b.values()) <= 1, "passes: 48 draws of 13 samples, each three or four times"


def break_shard(url: str, target: Path, keys: set[str]) -> str:
    """A copy of a data set in which some samples' videos are nonsense, as they were when it was indexed."""
    from pretrain.data.index import load_index, load_members, write_members

    shutil.copytree(url, target)
    for shard in load_index(str(target)).shards:
        members = load_members(str(target), shard)
        content = bytearray((target / shard.name).read_bytes())
        for key, offset, size in zip(members.keys, members.offsets, members.sizes, strict=True):
            if key in keys:
                video = content.index(b"ftyp", offset, offset + size)
                content[video : video + 1500] = bytes(1500)
        (target / shard.name).write_bytes(content)
        write_members(str(target), shard.name, dataclasses.replace(members, checksums=None))
    return str(target)


@pytest.fixture
def broken_sources(two_sources: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Source a with four broken videos of 23."""
    return {**two_sources, "a": break_shard(two_sources["a"], tmp_path / "broken", {"a0_1", "a0_2", "a1_0", "a2_5"})}


def test_bad_samples_are_replaced_from_their_source_and_recorded(
    make_recipe: MakeRecipe, broken_sources: dict[str, str], two_sources: dict[str, str], tmp_path: Path
) -> None:
    recipe = make_recipe(broken_sources, lanes=1)
    batches = take(recipe, steps=4)
    good = clips(take(make_recipe(two_sources, lanes=1), steps=4))
    records = [bad for batch in batches for bad in batch["bad"]]
    assert {bad.key for bad in records} <= {"a0_1", "a0_2", "a1_0", "a2_5"}
    assert {(bad.source, bad.reason) for bad in records} <= {("a", "open"), ("a", "decode")}
    replaced = {bad.position for bad in records}
    assert len([bad for bad in records if bad.attempt == 0]) == len(replaced) >= 3
    found = clips(batches)
    for place, clip in good.items():
        assert (found[place]["key"] == clip["key"]) == (place[1] not in replaced)
        assert found[place]["source"] == clip["source"], "the substitute is of the same source"
    again = take(make_recipe(broken_sources, lanes=1), steps=2, rank=1, world=2)
    assert_same(clips(again), {place: c for place, c in found.items() if place[1] % 2 == 1 and place[1] < 16})
    ledger = BadSampleLedger(tmp_path, ["a", "b"], rate=0.5, minimum=1)
    for batch in batches:
        ledger.record(batch)
    assert ledger.total == len(records) and ledger.tried.total() == 32 + len(records)


def test_too_many_bad_samples_stop_the_run(
    make_recipe: MakeRecipe, broken_sources: dict[str, str], tmp_path: Path
) -> None:
    ledger = BadSampleLedger(tmp_path, ["a", "b"], rate=0.01, minimum=3)
    for batch in take(make_recipe(broken_sources), steps=12):
        ledger.record(batch)
        if error := ledger.judge(ledger.numbers()):
            break
    assert error and "source a: 3 of" in str(error)
    assert len((tmp_path / "bad_samples" / "rank_00000.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_without_a_usable_sample_is_one_clear_error(
    workers: int, make_recipe: MakeRecipe, two_sources: dict[str, str], tmp_path: Path
) -> None:
    everything = {f"b{s}_{i}" for s, size in enumerate([6, 5, 2]) for i in range(size)}
    url = break_shard(two_sources["b"], tmp_path / "broken", everything)
    recipe = make_recipe({"b": url}, bad_attempts=3, workers=workers)
    opened = training_stream(recipe)
    with pytest.raises(DataError, match="source b: .* and its 3 substitutes are all unusable") as caught:
        next(opened)
    opened.close()
    assert "Traceback" not in str(caught.value)


def test_another_sample_than_the_index_says_is_replaced(
    make_recipe: MakeRecipe, two_sources: dict[str, str], tmp_path: Path
) -> None:
    """Content that changed under the same size, without checksums: told by its key, replaced, with reason and shard."""
    url = Path(break_shard(two_sources["a"], tmp_path / "a", set()))
    table = url / "00004.members.json"
    table.write_text(table.read_text().replace("a4_0", "another"))
    shard = bytearray((url / "00000.tar").read_bytes())
    shard[:512] = bytes(512)
    (url / "00000.tar").write_bytes(shard)
    bad = [bad for batch in take(make_recipe({"a": str(url)}, lanes=1), steps=4) for bad in batch["bad"]]
    assert {(record.shard, record.reason) for record in bad} == {("00000.tar", "index"), ("00004.tar", "index")}
    assert any("another promised by the index, ['a4_0'] found" in record.detail for record in bad)


def _cut(url: Path) -> str:
    path = url / "00002.tar"
    path.write_bytes(path.read_bytes()[:-1024])
    return r"00002.tar: \d+ bytes, its index says \d+: cut, or another file of the same name.*--check"


def _remove(name: str) -> Callable[[Path], str]:
    def remove(url: Path) -> str:
        (url / name).unlink()
        return f"{name}: can't be read: it is listed in the index but is not there.*--check"

    return remove


def _damage_table(url: Path) -> str:
    (url / "00002.members.json").write_text('{"keys": [')
    return "00002.members.json: no readable member table.*--index-only"


def _checksums(change: Callable[[list[int]], list[int]], said: str) -> Callable[[Path], str]:
    def damage(url: Path) -> str:
        table = url / "00002.members.json"
        content = json.loads(table.read_text())
        table.write_text(json.dumps(content | {"crc32": change(content["crc32"])}))
        return said

    return damage


DAMAGES = {
    "cut": _cut,
    "no shard": _remove("00002.tar"),
    "no table": _remove("00002.members.json"),
    "no json": _damage_table,
    "other bytes": _checksums(lambda values: [value ^ 1 for value in values], "00002.tar: sample .* has other bytes"),
    "a checksum short": _checksums(lambda values: values[1:], r"columns .* list \[\d, \d\] samples.*--index-only"),
    "no checksums": _checksums(lambda values: [1 << 40, *values[1:]], "no readable member table.*--index-only"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("cached", [False, True])
def test_shards_that_differ_from_their_index_stop_the_run(
    damage: Callable[[Path], str], cached: bool, make_recipe: MakeRecipe, two_sources: dict[str, str], tmp_path: Path
) -> None:
    """No sample is to blame, so none stands in."""
    url = shutil.copytree(two_sources["a"], tmp_path / "a")
    message = damage(url)
    recipe = make_recipe({"a": str(url)}, lanes=1, cache_dir=str(tmp_path / "cache") if cached else None)
    with pytest.raises(DataError, match=message):
        take(recipe, steps=4)


def test_wrong_batch_arithmetic_names_the_fix(make_recipe: MakeRecipe, two_sources: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="batch.samples=8 is not a multiple of batch.micro=2 x 3 ranks.* 6 or 12"):
        training_stream(make_recipe(two_sources), world=3)
    with pytest.raises(DataError, match="set batch.samples lower"):
        training_stream(make_recipe(two_sources, samples=64))
    with pytest.raises(RecipeError, match="data.sources is empty"):
        open_sources(make_recipe({}).data)


def test_samples_that_cannot_travel(make_recipe: MakeRecipe, two_sources: dict[str, str]) -> None:
    recipe = make_recipe(two_sources, workers=1)
    samples = ClipSamples(recipe.input, recipe.run.seed, lambda draw: {})
    with pytest.raises(DataError, match="build them of a module's classes and functions, or set data.workers=0"):
        training_stream(recipe, samples=samples)


def test_memory_urls_work(make_recipe: MakeRecipe, two_sources: dict[str, str]) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in Path(two_sources["b"]).iterdir():
        memory.pipe_file(f"/b/{path.name}", path.read_bytes())
    found = take(make_recipe({"b": "memory://b"}, samples=4), steps=3)
    expected = take(make_recipe({"b": two_sources["b"]}, samples=4), steps=3)
    assert_same(clips(found), clips(expected))


def test_plan_counts_steps(make_recipe: MakeRecipe, two_sources: dict[str, str]) -> None:
    recipe = make_recipe(two_sources)
    plan = open_plan(recipe.data, recipe.batch, recipe.run.seed)
    assert (plan.steps_per_epoch, plan.accumulation(2)) == (4, 2)
    assert shares(recipe.data, [source.shape for source in plan.sources]) == [23, 13]
    places = plan.places(number=2 * 5 + 1, rank=1, world_size=2)
    assert [(place.epoch, place.position) for place in places] == [(1, 8 + 5), (1, 8 + 7)]


STOPPED = """
import os, signal, sys, time, pickle, psutil
def children():
    return [p for p in psutil.Process().children() if "--multiprocessing-fork" in p.cmdline()]
def main():
    from tests.streams import training_stream
    stream = training_stream(pickle.loads(bytes.fromhex(sys.argv[1])))
    next(stream)
    workers = children()
    print(*[p.pid for p in workers], flush=True)
    sys.stdin.readline()
    for _ in range(20):
        next(stream)
    print("went on", flush=True)
    sys.stdin.readline()
    begin = time.monotonic()
    stream.close()
    # The DataLoader gives a worker that does not end 5 s, one after the other.
    print("closed", time.monotonic() - begin < 9, flush=True)
if __name__ == "__main__":
    main()
"""


@pytest.fixture
def trainer(make_recipe: MakeRecipe, two_sources: dict[str, str], tmp_path: Path) -> Any:
    """A process that streams with two workers, steered by lines; gone after the test."""
    import pickle

    script = tmp_path / "trainer.py"
    script.write_text(STOPPED)
    argument = pickle.dumps(make_recipe(two_sources, workers=2)).hex()
    process = subprocess.Popen(
        [sys.executable, str(script), argument],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    yield process
    process.kill()


def workers_of(pid: int) -> list[psutil.Process]:
    """Data workers among the children of a process; its resource tracker, and what has just ended, is none."""
    return [child for child in psutil.Process(pid).children() if _is_worker(child)]


def _is_worker(process: psutil.Process) -> bool:
    # A child that has not come to its own program yet still shows its parent's command line, so ask for a worker's.
    try:
        return "--multiprocessing-fork" in process.cmdline()
    except psutil.Error:
        return False


def gone(pids: list[int], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(psutil.pid_exists(pid) for pid in pids)


def test_workers_ignore_stop_signals_but_end_with_their_rank(trainer: Any) -> None:
    # While they start, before a line of their program.
    struck: set[int] = set()
    while len(struck) < 2:
        for process in workers_of(trainer.pid):
            if process.pid not in struck:
                struck.add(process.pid)
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGINT)
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    assert set(pids) == struck
    for pid, number in itertools.product(pids, [signal.SIGTERM, signal.SIGINT]):
        os.kill(pid, number)
    time.sleep(0.3)
    trainer.stdin.write("\n")
    trainer.stdin.flush()
    assert trainer.stdout.readline() == "went on\n"
    trainer.stdin.write("\n")
    trainer.stdin.flush()
    assert trainer.stdout.readline() == "closed True\n"
    assert trainer.wait(10) == 0
    assert gone(pids, 5)


def test_orphaned_workers_end(trainer: Any) -> None:
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    trainer.kill()
    trainer.wait()
    assert gone(pids, 60)  # they look every 5 s; busy machines are slow


def test_a_killed_worker_is_one_clear_error(make_recipe: MakeRecipe, two_sources: dict[str, str]) -> None:
    opened = training_stream(make_recipe(two_sources, workers=1))
    next(opened)
    (worker,) = workers_of(os.getpid())
    # Held first, so that it is killed while the rank waits for it: torch reports it wherever the rank is.
    worker.suspend()
    killer = threading.Timer(1.0, worker.kill)
    killer.start()
    with pytest.raises(DataError, match="a data worker died .* Killed for memory"):
        for _ in range(50):
            next(opened)
    killer.join()
    opened.close()


def test_generators_depend_on_all_their_parts() -> None:
    from pretrain.data.randomness import generator

    draws = {
        tuple(generator(*parts).integers(1 << 30, size=2))
        for parts in itertools.product([0, 1], [0, 1], [0, 1], [0, 1], ["clip", "crop"])
    }
    assert len(draws) == 32
    assert functools.partial(generator, 0)("crop").integers(1000) == generator(0, "crop").integers(1000)
