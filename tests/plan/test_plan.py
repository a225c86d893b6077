"""Plans: counted work against published and derived numbers, memory and time that behave, the command line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from pretrain.commands.plan import main
from pretrain.engine.model_states import ModelSize, checkpoint_bytes, model_states
from pretrain.errors import RecipeError
from pretrain.objectives.base import Method, Rule, method_of
from pretrain.objectives.videomae import VideoMAEObjective
from pretrain.plan.estimate import Planner
from pretrain.plan.feeding import Resources, feeding_of, shortages
from pretrain.plan.hardware import SHEETS, find_gpu
from pretrain.plan.peak_memory import OVERHEAD, USABLE, Memory, memory_of
from pretrain.plan.recomputation import recomputation_advice
from pretrain.plan.trace import BACKWARD, trace_step
from pretrain.plan.traffic import seconds_of, traffic_of
from pretrain.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]

#: ViT-B with a sixth of its blocks, each as wide: what is counted is the same in every block, and is traced one by one.
SHORT = [
    "model.size=custom", "model.patch_size=16", "model.dim=768", "model.depth=2", "model.heads=12", "model.mlp_ratio=4",
    "model.decoder_dim=384", "model.decoder_depth=1", "model.decoder_heads=6",
]  # fmt: skip


def short_method(*words: str) -> Method:
    """The short model, by words of its recipe."""
    return method_of(load_recipe("vit_b_dual", [*SHORT, *words]))


@pytest.mark.parametrize(
    ("name", "overrides", "published"),
    [
        ("vit_b_dual", ["objective.decoder_mask=none"], 35.48),
        ("vit_b_dual", [], 25.87),
        ("vit_g_dual", ["objective.decoder_mask=none"], 263.93),
        ("vit_g_dual", [], 241.61),
    ],
)
def test_work_is_the_published(name: str, overrides: list[str], published: float) -> None:
    parts = method_of(load_recipe(name, [*overrides, "input.views=1"])).cost().macs
    assert sum(parts.values()) / 1e9 == pytest.approx(published, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("vit_b_dual", [*SHORT, "objective.decoder_mask=none"]), ("vit_b_dual", SHORT), ("vit_g_dual", ["model.depth=2"])],
)
def test_counted_work_is_all_less_what_is_skipped(name: str, overrides: list[str]) -> None:
    """Of every kind of block; how many of them there are is in the work that is published."""
    recipe = load_recipe(name, [*overrides, "input.views=1"])
    parts = method_of(recipe).cost().macs
    skipped = sum(macs for part, macs in parts.items() if part.startswith("skipped"))
    trace = trace_step(method_of(recipe), 1)
    assert trace.forward_flops / 2 == pytest.approx(sum(parts.values()) - skipped, rel=2e-3)


def test_every_turn_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass each, and backward passes that stop where the turn's parameters end."""
    once = trace_step(short_method(), 1)

    def rule(self: Any, name: str, shape: Any) -> Rule:
        return Rule(turn="encoder" if name.startswith("model.encoder.") else "decoder")

    monkeypatch.setattr(VideoMAEObjective, "turns", ("decoder", "encoder"))
    monkeypatch.setattr(VideoMAEObjective, "rule", rule)
    turns = trace_step(short_method(), 1)
    assert turns.forward_flops == 2 * once.forward_flops
    backward = [trace.flops(BACKWARD) for trace in (once, turns)]
    assert backward[0] < backward[1] < 1.5 * backward[0], "weights have gradients in one of the turns"
    assert turns.peak_bytes < 1.1 * once.peak_bytes, "a turn's activations are gone before the next one's come"


def test_recomputing_costs_a_forward_pass_and_saves_memory() -> None:
    kept, recomputed = (
        trace_step(method_of(load_recipe("vit_b_dual", [f"compute.activation_checkpointing={word}"])), 2)
        for word in ("false", "true")
    )
    extra = recomputed.flops() - kept.flops()
    # A block's last matrix product is not repeated: nothing in the backward pass needs its result.
    assert 0.6 * kept.forward_flops < extra < 0.8 * kept.forward_flops
    assert recomputed.peak_bytes < 0.4 * kept.peak_bytes


def test_selective_checkpointing_lies_between() -> None:
    kept, selective, recomputed = (
        trace_step(short_method(f"compute.activation_checkpointing={word}", "input.views=1"), 4)
        for word in ("false", "selective", "true")
    )
    assert selective.flops() == kept.flops()  # no matrix product twice
    assert recomputed.peak_bytes < selective.peak_bytes < kept.peak_bytes


@pytest.mark.parametrize(("stage", "dtype"), [("1", "fp32"), pytest.param("3", "bf16", marks=pytest.mark.faults)])
def test_planned_memory_is_what_a_process_takes(stage: str, dtype: str) -> None:
    command = [sys.executable, str(ROOT / "bench" / "memory.py"), "--stage", stage, "--dtype", dtype]
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    assert float(line.partition("plan / real ")[2].split()[0]) == pytest.approx(1, abs=0.1), line


def test_parts_add_up_and_backward_is_twice_the_forward_pass() -> None:
    trace = trace_step(short_method(), 1)
    assert {"embedding", "attention", "MLP", "decoder", "targets and loss", "backward"} <= set(trace.parts)
    assert sum(trace.flops(part) for part in trace.parts) == trace.flops()
    # Fused attention computes its scores again, the embedding needs no gradient of the pixels.
    assert 1.95 < trace.flops("backward") / trace.forward_flops < 2.1


def test_states_are_sharded_by_stage() -> None:
    def total(stage: int, ranks: int) -> float:
        recipe = load_recipe("vit_b_dual", [f"zero.stage={stage}", "compute.dtype=bf16", "zero.bucket_mb=1"])
        return memory_of(recipe, ModelSize(100_000_000, 100_000_000), ranks, 0.0).total / 1e8

    stages = [total(stage, 64) for stage in range(4)]
    assert stages == sorted(stages, reverse=True)
    assert total(3, 64) < total(3, 8)


MILLION = ModelSize(1_000_000, 1_000_000)


def planned(size: ModelSize, *words: str, ranks: int = 4, activations: float = 0.0) -> Memory:
    """Memory of a rank, by small buckets."""
    recipe = load_recipe("vit_b_dual", ["zero.bucket_mb=1", "compute.dtype=bf16", "batch.micro=1", *words])
    return memory_of(recipe, size, ranks, activations)


def test_the_optimiser_is_the_recipes() -> None:
    adamw = planned(MILLION, "zero.stage=1").optimiser
    assert adamw == 12e6 / 4
    assert planned(MILLION, "zero.stage=1", "optim.name=sgd", "optim.momentum=0.9").optimiser == 8e6 / 4
    assert planned(MILLION, "zero.stage=1", "optim.name=sgd", "optim.momentum=0").optimiser == 4e6 / 4
    assert planned(MILLION, "zero.stage=1", "optim.name=adam").optimiser == adamw
    assert planned(MILLION, "zero.stage=0", "compute.dtype=fp32", "optim.name=lars").optimiser == 4e6
    # Torch's own optimiser updates float32 weights where nothing is sharded.
    assert planned(MILLION, "zero.stage=0", "compute.dtype=fp32", "optim.name=sgd", "optim.momentum=0").optimiser == 0


@pytest.mark.parametrize("stage", range(4))
def test_frozen_parameters_are_weights_only(stage: int) -> None:
    none = planned(MILLION, f"zero.stage={stage}")
    half = planned(ModelSize(2_000_000, 1_000_000, buffer_bytes=700), f"zero.stage={stage}")
    assert (half.gradients, half.optimiser) == (none.gradients, none.optimiser)
    assert half.weights == 2 * none.weights
    if stage < 3:
        assert half.buffers == none.buffers + 700


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_states_are_not_on_the_accelerator(stage: int) -> None:
    on, off = (planned(MILLION, f"zero.stage={stage}", f"zero.offload={where}") for where in ("none", "cpu"))
    assert (off.optimiser, off.weights) == (0, on.weights)
    gradients = {1: 1, 2: 1, 3: 2}[stage]  # what the update reads; stage 3 adds them up there, too
    assert off.host == (12 + 4 * gradients) * 1e6 / 4
    assert off.total < on.total


def test_gradients_of_earlier_micro_batches_are_there_beside_activations() -> None:
    for stage, kept in (("0", 2e6), ("2", 4e6 / 4), ("3", 4e6 / 4)):
        memory = planned(MILLION, f"zero.stage={stage}", "batch.samples=8", activations=1e12)
        assert memory.gradients == kept, "two micro-batches of four ranks"
    assert planned(MILLION, "zero.stage=2", "batch.samples=4", activations=1e12).gradients == 0


def test_stage_3_gathers_no_more_than_it_may() -> None:
    """A bucket of 1 MB: at most two of weights, and the last all-gather a second time, beside the one of gradients."""
    for size, gathered in ((MILLION, 2e6 + 2**20), (ModelSize(10**9, 10**9), 3 * 2**20)):
        memory = planned(size, "zero.stage=3", activations=1e12)
        assert memory.buffers == pytest.approx(2**20 + gathered, abs=4)


@pytest.mark.parametrize(
    ("words", "width"),
    [
        ("compute.dtype=fp32 zero.stage=0", 12),
        ("compute.dtype=fp32 zero.stage=1", 16),
        ("compute.dtype=fp32 zero.stage=1 optim.name=sgd optim.momentum=0.9", 12),
        ("compute.dtype=fp32 zero.stage=3", 12),
        ("compute.dtype=bf16 zero.stage=0", 14),
        ("compute.dtype=bf16 zero.stage=2", 14),
        ("compute.dtype=bf16 zero.stage=3", 12),
    ],
)
def test_sizes_of_checkpoints_are_those_of_files_that_deepspeed_wrote(words: str, width: int) -> None:
    """Seven trained linear layers of 500 and a frozen one, by one rank: file sizes less 0.02 bytes a parameter."""
    recipe = load_recipe("vit_s_dual", words.split())
    frozen = 4 if "fp32" in words else 2
    assert checkpoint_bytes(recipe, ModelSize(8 * 250_500, 7 * 250_500)) == 250_500 * (7 * width + frozen)


def test_a_plan_and_a_dry_run_count_alike() -> None:
    for words in (["zero.stage=2"], ["zero.stage=3", "zero.offload=cpu"], ["compute.dtype=fp32", "optim.name=sgd"]):
        method = short_method("batch.micro=2", *words)
        planner = Planner(method, SHEETS["h100"], Resources(), [], None)
        memory = planner.estimate(64).memory
        for part in model_states(method.recipe, planner.size, 64):
            if part.kind in ("weights", "optimiser") and not part.host:
                assert getattr(memory, part.kind) == part.size


def test_the_micro_batch_that_is_copied_ahead_is_counted() -> None:
    gpu = SHEETS["h100"]
    planner = Planner(short_method("input.views=1", "batch.samples=64", "batch.micro=2"), gpu, Resources(), [], None)
    plan, two = planner.estimate(32), planner.trace(2)
    example = planner.method.example(2)
    assert two.batch_bytes == sum(value.nbytes for value in example.values() if isinstance(value, Tensor))
    assert two.batch_bytes > 2 * 16 * 224 * 224 * 3, "pixels, and the masks beside them"
    alone = memory_of(planner.recipe, planner.size, 32, two.peak_bytes)
    assert plan.memory.total - alone.total == plan.memory.buffers - alone.buffers == two.batch_bytes
    # A device that would just hold two videos without it holds one.
    planner.gpu = replace(gpu, memory=(alone.total + OVERHEAD + two.batch_bytes / 2) / USABLE)
    assert planner.estimate(32).largest_micro == 1


@pytest.mark.faults
def test_a_recipe_is_planned_whole() -> None:
    recipe = load_recipe("vit_g_dual")
    planner = Planner(method_of(recipe), SHEETS["h100"], Resources(), [], 1_000_000)
    plan = planner.estimate(64)
    assert plan.accumulation * plan.micro * 64 == recipe.batch.samples
    assert plan.memory.total < SHEETS["h100"].memory
    assert 0.3 < plan.mfu < 1
    assert plan.hours == pytest.approx(plan.steps * plan.times.total / 3600)
    # The largest micro-batch fits, and one more does not.
    for micro, fits in ((plan.largest_micro, True), (plan.largest_micro + 8, False)):
        trace = planner.trace(micro)
        held = memory_of(recipe, planner.size, 64, trace.peak_bytes, trace.batch_bytes).total + 2.5e9
        assert (held <= 0.94 * SHEETS["h100"].memory) == fits


def test_what_does_not_fit_says_what_to_change() -> None:
    gpu = replace(SHEETS["a100-40"], memory=8e9)
    planner = Planner(short_method("zero.stage=0"), gpu, Resources(), [], None)
    problems = planner.estimate(32).problems
    assert any("at most" in problem and "planned with batch.micro=" in problem for problem in problems)
    planner.gpu = replace(SHEETS["v100"], memory=3e9)
    assert "Raise zero.stage" in planner.estimate(32).problems[0]


def test_recomputing_less_is_advised_where_it_fits() -> None:
    recipe = load_recipe("demo", ["compute.activation_checkpointing=true"])
    planner = Planner(method_of(recipe), SHEETS["h100"], Resources(), [], None)
    [line] = recomputation_advice(planner, planner.estimate(1))
    assert line.startswith("compute.activation_checkpointing=false with batch.micro=") and "% off the step" in line


@pytest.mark.parametrize(
    ("words", "seconds", "advised"),
    [
        (["true"], {"selective": 0.8, "false": None}, ["selective"]),  # to keep everything does not fit
        (["true"], {"selective": 0.99, "false": None}, []),
        (["true"], {"selective": 0.8, "false": 0.7}, ["false"]),
        (["true", "compute.compile=true"], {"selective": 0.5, "false": 0.7}, ["false"]),
        (["selective"], {"selective": 0.5, "false": 0.7}, ["false"]),
        (["false"], {"selective": 0.5, "false": 0.7}, []),
    ],
)
def test_the_fastest_of_what_fits_is_advised(
    monkeypatch: pytest.MonkeyPatch, words: list[str], seconds: dict[str, float | None], advised: list[str]
) -> None:
    def estimate(self: Any, gpus: int) -> Any:
        took = seconds[str(self.recipe.compute.activation_checkpointing).lower()]
        fits = int(took is not None)
        return SimpleNamespace(largest_micro=fits, times=SimpleNamespace(total=took), micro=1, memory=held)

    held = SimpleNamespace(total=1e9)
    now: Any = SimpleNamespace(largest_micro=1, gpus=1, times=SimpleNamespace(total=1.0), memory=held)
    recipe = load_recipe("demo", [f"compute.activation_checkpointing={words[0]}", *words[1:]])
    monkeypatch.setattr(Planner, "estimate", estimate)
    found = recomputation_advice(Planner(method_of(recipe), SHEETS["h100"], Resources(), [], None), now)
    assert [line.split()[0].partition("=")[2] for line in found] == advised


def test_starving_accelerators_are_named() -> None:
    resources = Resources(decode_ms=40, cores=4, store_gbs=0.5)
    method = short_method("input.views=1", "batch.micro=2")
    *_, cores, store = Planner(method, SHEETS["h100"], resources, [], None).estimate(64).problems
    assert "cores for each accelerator, 4 are there" in cores and "input.views" in cores
    assert "0.5 are there" in store and "data.cache_dir" in store


@pytest.mark.parametrize(
    ("words", "busy", "workers", "advice"),
    [
        ([], 9.0, 12, None),  # one for each core
        ([], 12.4, 12, None),  # as many as there are whole cores
        (["data.workers=8"], 9.0, 8, "set data.workers=11"),
        (["data.workers=8"], 11.0, 8, "set data.workers=null"),
        (["data.workers=8"], 7.0, 8, None),
    ],
)
def test_workers_are_planned_by_the_cores_that_are_there(
    words: list[str], busy: float, workers: int, advice: str | None
) -> None:
    recipe, there = load_recipe("vit_b_dual", [*words, "input.views=1"]), Resources(decode_ms=10, cores=12.5)
    found = feeding_of(recipe, busy * 100 * 64, 64, there, [])
    assert (found.cores, found.workers) == (pytest.approx(busy), workers)
    said = shortages(recipe, found, there)
    assert len(said) == (advice is not None) and (advice is None or said[0].endswith(advice))


def test_traffic_of_stages() -> None:
    def sent(stage: int, accumulation: int, *more: str) -> float:
        recipe = load_recipe("vit_b_dual", [f"zero.stage={stage}", "compute.dtype=bf16", *more])
        return traffic_of(recipe, ModelSize(1000, trained), 4, accumulation).total

    trained = 1000
    assert [sent(stage, 1) for stage in range(4)] == [3000, 4500, 4500, 4500]
    assert [sent(stage, 2) for stage in range(4)] == [3000, 4500, 7500, 9000]
    assert sent(2, 1, "zero.communication_dtype=fp32") == 7500
    trained = 100  # frozen weights have no gradient and no update; stage 3 gathers them all the same
    assert [sent(stage, 2) for stage in range(4)] == [300, 450, 750, 300 + 6000]


def test_ranks_of_several_nodes_send_through_all_network_cards_of_theirs() -> None:
    gpu = replace(SHEETS["h100"], link_gbs=300.0, network_gbs=20.0)
    assert seconds_of(3e9, gpu, 8) == pytest.approx(0.01) and seconds_of(1.6e9, gpu, 16) == pytest.approx(0.01)
    assert seconds_of(3e9, replace(gpu, network_gbs=50.0), 16) == pytest.approx(0.01), "never faster than the link"


def test_command_writes_tables_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", "vit_s_dual", *SHORT, "--gpu", "a100", "--sweep", "gpus=16,64,512"]
    words += ["--json", str(tmp_path / "plan.json")]
    assert main([*words, "--plot", str(tmp_path / "plan.png"), "input.views=2"]) == 0
    assert "64 x a100" in capsys.readouterr().out
    plans = json.loads((tmp_path / "plan.json").read_text())
    assert [plan["gpus"] for plan in plans] == [16, 64, 512]
    rates = [plan["clips_per_s"] / plan["gpus"] for plan in plans]
    assert rates == sorted(rates, reverse=True)
    lanes = ["data.lanes=512" in " ".join(plan["problems"]) for plan in plans]
    assert lanes == [False, False, True], "more ranks than lanes are planned, with what a run on them needs"
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_measured_rates_and_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = tmp_path / "rates.json"
    rates.write_text('{"matmul_tflops": 700, "device": "x"}')
    gpu = find_gpu("h100", rates)
    assert (gpu.matmul_tflops, gpu.memory_gbs, gpu.measured) == (700, SHEETS["h100"].memory_gbs, True)
    rates.write_text("[]")
    with pytest.raises(RecipeError, match="none of matmul_tflops"):
        find_gpu("h100", rates)
    for words, message in (
        (["--gpu", "tpu"], "known are v100"),
        (["--gpus", "7"], "must divide batch.samples"),
        (["--sweep", "gpus=a"], "allowed is gpus="),
        (["input.stride=x"], "input.stride"),
    ):
        assert main(["--recipe", "vit_s_dual", *words]) == 2
        assert message in capsys.readouterr().err
