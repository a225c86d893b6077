"""Writes checkpoints of a tiny model on some ranks, or loads them into engines of other layouts.

Engines are trained for two steps and saved with what is in them, put together by DeepSpeed's own functions. What is
loaded into other engines must be the same bit for bit, by the same functions.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: By default DeepSpeed takes gigabytes for the buckets of each engine.
SMALL = dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"), 1000)
VARIANTS = (("fp32", "adamw"), ("bf16", "adamw"), ("fp32", "sgd"))


class Model(nn.Module):
    """All that a checkpoint may hold: sizes that no number of ranks divides, frozen parts, buffers, an unused part."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def values(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.first = nn.Parameter(values(7, 5))
        self.shift = nn.Parameter(values(1))
        self.second = nn.Parameter(values(5, 3))
        self.unused = nn.Parameter(values(11))
        self.frozen = nn.Parameter(values(3, 3), requires_grad=False)
        self.register_buffer("average", values(4))
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("computed", torch.ones(2), persistent=False)

    def forward(self, batch: Tensor) -> Tensor:
        return (((batch @ self.first).tanh() + self.shift) @ self.second @ self.frozen).square().mean()


def build(variant: tuple[str, str], stage: int, seed: int) -> tuple[Any, list[list[str]]]:
    """An engine, and the names of its optimiser's parameters by group."""
    import deepspeed

    from pretrain.engine.optimiser import forget_steps

    dtype, kind = variant
    model = Model(seed)
    names = [["first", "second"], ["shift", "unused"]]
    groups = [{"params": [getattr(model, name) for name in group], "lr_scale": 1.0} for group in names]
    if kind == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 4} | SMALL,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if dtype == "bf16":
        config |= {"bf16": {"enabled": True}} | ({"data_types": {"grad_accum_dtype": "fp32"}} if stage else {})
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    forget_steps(engine.basic_optimizer)
    return engine, names


def trained(variant: tuple[str, str], stage: int) -> tuple[Any, list[list[str]]]:
    engine, names = build(variant, stage, seed=1)
    for step in range(2):
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.1
        batch = torch.randn(4, 7, generator=torch.Generator().manual_seed(step)).to(next(engine.parameters()).dtype)
        engine.backward(engine(batch))
        engine.step()
    engine.module.average.fill_(0.3)
    return engine, names


def content(engine: Any, names: list[list[str]], stage: int, kind: str) -> dict[str, Tensor]:
    """Everything in an engine by name, put together by DeepSpeed itself; on all ranks."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    states = ["momentum_buffer"] if kind == "sgd" else ["exp_avg", "exp_avg_sq"]
    found = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            found[f"forward {name}"] = parameter.detach().clone().float()
        if not parameter.requires_grad:
            continue
        if stage == 0:
            line = line_of(engine, names, name)
            found |= {name: line.detach().clone()}
            found |= {f"{s} {name}": engine.basic_optimizer.state[line].get(s, torch.zeros_like(line)) for s in states}
        else:
            if getattr(parameter, "_hp_mapping", None) is not None:  # DeepSpeed links these at the next step only
                (line,) = engine.basic_optimizer.param_groups[parameter._hp_mapping.param_group_index]["params"]
                parameter._hp_mapping.set_optim_state_fragment(line, engine.basic_optimizer.state[line])
            found[name] = safe_get_full_fp32_param(parameter).clone()
            found |= {f"{s} {name}": safe_get_full_optimizer_state(parameter, s).clone() for s in states}
    steps = {float(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state}
    return found | {"steps": torch.tensor(sorted(steps))}


def line_of(engine: Any, names: list[list[str]], name: str) -> Tensor:
    lines = [group["params"] for group in engine.basic_optimizer.param_groups]
    place = {member: lines[g][m] for g, group in enumerate(names) for m, member in enumerate(group)}
    return place[name]


def write(folder: Path, ranks: Any) -> None:
    """A checkpoint of every variant and stage, and what DeepSpeed says is in it."""
    for variant, stage in itertools.product(VARIANTS, range(4)):
        engine, names = trained(variant, stage)
        where = folder / f"{variant} {stage}"
        engine.save_checkpoint(str(where), tag="deepspeed")
        expected = content(engine, names, stage, variant[1])
        if ranks.first:
            torch.save(expected, where / "content.pt")


def read(folder: Path, ranks: Any, source: int, every: int) -> None:
    """Load checkpoints of `source` ranks into engines of other stages, every n-th pair; print where they differ."""
    from pretrain.checkpoint.reshape import Layout, load_reshaped

    for variant, old, new in list(itertools.product(VARIANTS, range(4), range(4)))[::every]:
        where = folder / f"{variant} {old}"
        expected = torch.load(where / "content.pt")
        engine, names = build(variant, new, seed=2)
        load_reshaped(engine, where / "deepspeed", Layout(source, old), Layout(ranks.world_size, new), names)
        found = content(engine, names, new, variant[1])
        wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
        print("LOADED", variant, f"stage {old} -> {new}:", wrong or "same", flush=True)
