"""Reading DeepSpeed's three layouts, written here value by value from their description."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.partitions import WEIGHT, Shards, open_shards
from pretrain.checkpoint.reshape import carry_counters, check_optimizer
from pretrain.errors import CheckpointError

GROUPS = [["a", "b", "c"], ["d"]]
SHAPES = {"a": torch.Size([3, 5]), "b": torch.Size([7]), "c": torch.Size([2, 2, 4]), "d": torch.Size([1])}


def values(kind: str, name: str) -> Tensor:
    """A number of its own for every value of every parameter and state."""
    first = 1000.0 * list(SHAPES).index(name) + (500 if kind == "exp_avg" else 0)
    return torch.arange(SHAPES[name].numel()) + first


def group_options() -> list[dict[str, Any]]:
    own = {"lr_scale": 1.0, "decay_scale": 1.0, "turn": "all"}
    return [{"params": [number], "betas": (0.9, 0.95), **own} for number in range(2)]


def wrapped(lines: dict[str, list[Tensor]], stage: int) -> dict[str, Any]:
    """One rank's optimiser as DeepSpeed stores it."""
    state = {n: {"exp_avg": line, "step": torch.tensor(7.0)} for n, line in enumerate(lines["exp_avg"])}
    base = {"state": state, "param_groups": group_options()}
    if stage == 3:
        return {"optimizer_state_dict": {"optimizer_state_dict": base, "fp32_flat_groups": lines[WEIGHT]}}
    key = "single_partition_of_fp32_groups"
    return {"optimizer_state_dict": {"base_optimizer_state": base, key: lines[WEIGHT]}}


def pad(line: Tensor, multiple: int) -> Tensor:
    return torch.cat([line, torch.full((-len(line) % multiple,), float("nan"))])


def line_of(kind: str, group: list[str], rank: int, world: int, stage: int) -> Tensor:
    if stage == 3:
        return torch.cat([pad(values(kind, name), world).chunk(world)[rank] for name in group])
    return pad(torch.cat([values(kind, name) for name in group]), 2 * world).chunk(world)[rank]


def write(folder: Path, world: int, stage: int, prefix: str = "") -> Path:
    counters = {"global_steps": 7, "global_samples": 56, "skipped_steps": 0}
    shapes = [{name: SHAPES[name] for name in group} for group in GROUPS] if stage else None
    module = {name: values(WEIGHT, name).view(shape) for name, shape in SHAPES.items()} | {"count": torch.tensor(3)}
    model: dict[str, Any] = {"module": module, "param_shapes": shapes, "frozen_param_shapes": None, **counters}
    if stage == 0:
        flat = [name for group in GROUPS for name in group]
        state = {n: {"exp_avg": values("exp_avg", name), "step": torch.tensor(7.0)} for n, name in enumerate(flat)}
        model["optimizer"] = {"state": state, "param_groups": group_options()}
    for rank in range(world):
        lines = {kind: [line_of(kind, g, rank, world, stage) for g in GROUPS] for kind in (WEIGHT, "exp_avg")}
        if stage:
            torch.save(wrapped(lines, stage), folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3:
            torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    if stage < 3:
        torch.save(model, folder / "mp_rank_00_model_states.pt")
    return folder


def opened(folder: Path, world: int, stage: int, **changes: Any) -> Shards:
    return open_shards(folder, world, stage, **({"groups": GROUPS, "shapes": SHAPES} | changes))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_stretch_of_every_parameter(world: int, stage: int, tmp_path: Path) -> None:
    shards = opened(write(tmp_path, world, stage, "bf16_" if stage == 1 else ""), world, stage)
    for kind in (WEIGHT, "exp_avg"):
        for name, shape in SHAPES.items():
            whole = values(kind, name)
            for begin in range(shape.numel()):
                for end in range(begin, shape.numel() + 1):
                    assert torch.equal(shards.read(kind, name, begin, end - begin), whole[begin:end])
    assert {name: float(step) for name, step in shards.scalars["step"].items()} == dict.fromkeys(SHAPES, 7.0)
    assert shards.options == {"betas"} and shards.counters["global_samples"] == 56 and shards.whole["count"] == 3


def test_values_that_are_not_there_are_refused(tmp_path: Path) -> None:
    shards = opened(write(tmp_path, 2, 1), 2, 1)
    with pytest.raises(CheckpointError, match="weight of a: 14 of the 15 values from 1 on"):
        shards.read(WEIGHT, "a", 1, 15)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    (write(tmp_path, 2, 3) / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 files missing: zero_pp_rank_1_mp_rank_00_optim_states.pt"):
        opened(tmp_path, 2, 3)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_other_parameters_are_refused(stage: int, tmp_path: Path) -> None:
    write(tmp_path, 2, stage)
    with pytest.raises(CheckpointError, match=r"1 trained parameters are not .*: b \[7\] -> \[8\].* run.init_weights"):
        opened(tmp_path, 2, stage, shapes=SHAPES | {"b": torch.Size([8])})


def test_another_order_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 2, 1)
    with pytest.raises(CheckpointError, match="in another order"):
        opened(tmp_path, 2, 1, groups=[["b", "a", "c"], ["d"]])


class Fp16Engine:
    """What a DeepSpeed engine has of fp16; DeepSpeed runs fp16 on accelerators only."""

    def __init__(self, **optimizer: Any) -> None:
        self.optimizer = SimpleNamespace(**optimizer)

    def fp16_enabled(self) -> bool:
        return True


@pytest.mark.parametrize(("old", "new"), [(0, 1), (1, 0), (2, 3)])
def test_the_loss_scale_of_fp16_moves_between_deepspeeds_two_kinds(old: int, new: int, tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig

    write(tmp_path, 2, old)
    scale = {"cur_scale": 512.0, "cur_iter": 41, "last_overflow_iter": 17}
    if old == 0:
        change(tmp_path / "mp_rank_00_model_states.pt", "optimizer", scale)
    else:
        scaler = DynamicLossScaler(2.0**16, 2.0, 1000, 1, 2, False, dtype=torch.float16)
        vars(scaler).update(scale)
        name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        change(tmp_path / name, "optimizer_state_dict", {"loss_scaler": scaler})
    holder: Any = (
        LossScaleConfig(torch.float16, True, 1.0, None)
        if new == 0
        else DynamicLossScaler(2.0**16, 2.0, 1000, 1, 2, False, dtype=torch.float16)
    )
    engine = Fp16Engine(**{"loss_scaler" if new else "loss_scale_config": holder})
    carry_counters(opened(tmp_path, 2, old), engine)
    assert {name: getattr(holder, name) for name in scale} == scale
    assert vars(engine)["global_steps"] == 7


def change(path: Path, section: str, entries: dict[str, Any]) -> None:
    content = torch.load(path, weights_only=False)
    content[section] |= entries
    torch.save(content, path)


def test_another_optimiser_is_refused(tmp_path: Path) -> None:
    shards = opened(write(tmp_path, 2, 1), 2, 1)
    check_optimizer(shards, torch.optim.AdamW([torch.zeros(1)]))
    # What a release of torch adds to the options is none of kind, whatever stands in the groups beside them.
    newer = torch.optim.AdamW([torch.zeros(1)])
    newer.defaults["added"] = True
    check_optimizer(shards, newer)
    with pytest.raises(CheckpointError, match=r"options betas, this run's SGD has .*momentum.* run.init_weights"):
        check_optimizer(shards, torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9))
