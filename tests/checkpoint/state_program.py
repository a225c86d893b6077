"""Averages, a momentum teacher, a queue and a bank beside the weights, on some ranks and in every ZeRO stage.

Engines are trained and saved as runs do it, and loaded into engines of other layouts. Lines that start with CHECKED
name what was compared and what was wrong with it.
"""

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DECAY, MOMENTUM, STEPS = 0.9, (0.6, 0.8, 0.95), 3
#: By default DeepSpeed takes gigabytes for the buckets of each engine.
SMALL = dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"), 1000)
#: dtype, ZeRO stage, whether the model is built in shards
VARIANTS = [("fp32", stage, False) for stage in range(4)] + [("bf16", 1, False), ("bf16", 3, False), ("bf16", 3, True)]
#: Rows of the bank on one of `ranks`; 12 are dealt to 1, 2 and 3.
ROWS = 12


class Net(nn.Module):
    """Sizes that two and three ranks don't divide, a frozen part, a count, a statistic."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.hidden, self.out = nn.Linear(7, 5), nn.Linear(5, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.table = nn.Parameter(torch.ones(7), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("level", torch.full((5,), float(seed)))
        import deepspeed

        for parameter in self.parameters():  # in shards, parts that are built are partitioned already
            values = torch.randn(getattr(parameter, "ds_shape", parameter.shape), generator=generator)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
                parameter.data.copy_(values)

    def forward(self, batch: Tensor) -> Tensor:
        hidden = self.hidden(batch * self.table)
        if self.training:
            self.count += 1
            self.level.lerp_(hidden.detach().mean(0).to(self.level.dtype), 0.5)
        return self.out(((hidden - self.level.to(hidden.dtype)) * self.scale).tanh())


class Method(nn.Module):
    """A student that follows its teacher, with a queue of all ranks' keys and a bank of each rank's."""

    def __init__(self, seed: int, rank: int, ranks: int) -> None:
        super().__init__()
        from pretrain.models.averages import MomentumTeacher, WeightAverage

        self.model = Net(seed)
        self.average = WeightAverage(self.model, DECAY)
        self.teacher = MomentumTeacher(self.model, Net(seed + 1))
        self.queue = torch.full((5, 3), float(seed), device="cpu").double()  # zero.Init makes bf16 of what is made
        self.bank = torch.zeros(ROWS // ranks, dtype=torch.int64, device="cpu") - seed
        self.noise = torch.full((2,), -seed - rank, dtype=torch.int8, device="cpu")

    def rank_state(self) -> dict[str, Any]:
        from pretrain.checkpoint.rank_state import RankState

        return {
            "queue": RankState(self.queue, "same_on_all"),
            "bank": RankState(self.bank, "concatenate_positions"),
            "noise": RankState(self.noise, "start_anew"),
        }

    def forward(self, batch: Tensor) -> Tensor:
        return (self.model(batch) - self.teacher(batch + 1)).float().square().mean()

    def after_step(self, step: int) -> None:
        self.average.update(self.model)
        self.teacher.update(self.model, MOMENTUM[step % len(MOMENTUM)])


def build(dtype: str, stage: int, sharded: bool, seed: int, ranks: Any) -> tuple[Any, list[list[str]]]:
    import contextlib

    import deepspeed

    from pretrain.engine.optimiser import forget_steps

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 4} | SMALL,
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype == "bf16":
        config |= {"bf16": {"enabled": True}} | ({"data_types": {"grad_accum_dtype": "fp32"}} if stage else {})
    with deepspeed.zero.Init(config_dict_or_path=config) if sharded else contextlib.nullcontext():
        method = Method(seed, ranks.rank, ranks.world_size)
    named = [(name, parameter) for name, parameter in method.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [parameter for _, parameter in named], "lr_scale": 1.0}], lr=0.0)
    engine, *_ = deepspeed.initialize(model=method, optimizer=optimizer, config=config)
    forget_steps(engine.basic_optimizer)
    return engine, [[name for name, _ in named]]


def step(engine: Any, number: int, ranks: Any) -> None:
    """One update; fills the queue with what all ranks know and the bank with this rank's positions."""
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.05
    generator = torch.Generator().manual_seed(number)
    batch = torch.randn(4, 7, generator=generator).to(engine.module.model.table.dtype)
    engine.backward(engine(batch))
    engine.step()
    engine.module.after_step(number)
    engine.module.queue[number % 5] = number + 0.25
    rows = len(engine.module.bank)
    engine.module.bank.copy_(100 * number + torch.arange(rows) * ranks.world_size + ranks.rank)
    engine.module.noise.fill_(10 * number + ranks.rank)


def whole(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """What forward passes compute with, by DeepSpeed's own gathering."""
    import deepspeed

    found = {}
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return found


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if not name.endswith("table")}


def followed(module: nn.Module) -> dict[str, Tensor]:
    """What there are averages of, whole."""
    return whole(trained(module)) | {"level": module.level.clone()}


def together(average: Any, ranks: Any) -> dict[str, Tensor]:
    """Averages as they are in memory, shares of all ranks put together."""
    from pretrain.runtime.process_group import gather_objects

    found = {}
    for key, name in average._names.items():
        value = getattr(average, key)
        if average.is_split and key in average.shapes:
            found[name] = torch.cat(gather_objects(ranks, value.clone())).reshape(average.shapes[key])
        else:
            found[name] = value.clone()
        assert value.dtype == torch.float32
    return found


def holds(engine: Any, ranks: Any) -> dict[str, Any]:
    """All that must be the same after loading, put together from all ranks, by name."""
    module = engine.module
    found = {f"live {name}": value for name, value in whole(trained(module.model)).items()}
    # DeepSpeed rounds statistics to bfloat16 in some stages and not in others.
    found["live level"] = module.model.level.clone().bfloat16()
    found |= {f"average {name}": value for name, value in together(module.average, ranks).items()}
    found |= {f"momentum {name}": value for name, value in together(module.teacher.average, ranks).items()}
    found |= {f"twin {name}": value for name, value in whole(dict(module.teacher.twin.named_parameters())).items()}
    found |= {"updates": module.average.updates.clone(), "seen": module.teacher.twin.count.clone()}
    return found


def wrong(found: dict[str, Any], expected: dict[str, Any]) -> str:
    names = [name for name in expected if name not in found or not torch.equal(found[name], expected[name])]
    return ", ".join(names) or "same"


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Float32 rounding of some updates, relative to values of size one."""
    far = {name: float((found[name].double() - expected[name]).abs().max()) for name in expected}
    return ", ".join(f"{name} {value:g}" for name, value in far.items() if not value < 1e-6) or "same"


def write(folder: Path, ranks: Any) -> None:
    for dtype, stage, sharded in VARIANTS:
        title = f"{dtype} {stage}{' in shards' if sharded else ''}"
        engine, names = build(dtype, stage, sharded, 1, ranks)
        check_updates(engine, title, ranks)
        check_applied(engine, title, ranks)
        check_resume(engine, names, folder / title, title, (dtype, stage, sharded), ranks)


def check_updates(engine: Any, title: str, ranks: Any) -> None:
    """Averages against sums in float64, the loop that there was against the fused update, the twin against both."""
    module = engine.module
    # Averages start from the weights as they were built, which the engine may have rounded since.
    start = {name: value.double() for name, value in together(module.average, ranks).items()}
    live = followed(module.model)
    print("CHECKED", title, "start:", wrong({n: v.to(live[n].dtype) for n, v in start.items()}, live), flush=True)
    average, momentum = dict(start), dict(start)
    loop = {name: value.float() for name, value in start.items()}
    for number in range(STEPS):
        step(engine, number, ranks)
        for name, value in followed(module.model).items():
            share = MOMENTUM[number]
            average[name] = DECAY * average[name] + (1 - DECAY) * value.double()
            momentum[name] = share * momentum[name] + (1 - share) * value.double()
            loop[name].lerp_(value.float(), 1 - DECAY)
    found = together(module.average, ranks)
    print("CHECKED", title, "averages:", close(found, average), flush=True)
    print("CHECKED", title, "loop:", wrong(found, loop), flush=True)
    teacher = together(module.teacher.average, ranks)
    del momentum["level"]  # the teacher's statistics are of its own passes
    print("CHECKED", title, "momentum:", close(teacher, momentum), flush=True)
    twin = whole(trained(module.teacher.twin))
    print("CHECKED", title, "twin:", wrong(twin, {n: v.to(twin[n].dtype) for n, v in teacher.items()}), flush=True)
    # What the teacher computes, by a model of its own.
    alone = Net(1).to(next(iter(twin.values())).dtype)
    alone.load_state_dict(twin, strict=False)
    alone.level = module.teacher.twin.level.clone()
    alone.table.data.copy_(whole({"table": module.model.table})["table"])
    batch = torch.randn(4, 7, generator=torch.Generator().manual_seed(9)).to(alone.table.dtype)
    output = module.teacher(batch)
    said = "same" if torch.equal(output, alone(batch)) and not output.requires_grad else "differs"
    print("CHECKED", title, "teacher forward:", said, flush=True)
    moved = all(not torch.equal(value, start[name].to(value.dtype)) for name, value in twin.items())
    print("CHECKED", title, "moved:", "same" if moved else "not at all", flush=True)


def check_applied(engine: Any, title: str, ranks: Any) -> None:
    """Evaluated weights: forward passes with the averages, and the live weights back, also after an error."""
    module = engine.module.eval()
    batch = torch.randn(4, 7, generator=torch.Generator().manual_seed(9)).to(module.model.table.dtype)
    averages, live = together(module.average, ranks), followed(module.model)
    alone = Net(1).to(module.model.table.dtype).eval()
    alone.load_state_dict(averages, strict=False)
    alone.level = averages["level"].to(module.model.level.dtype)
    alone.table.data.copy_(whole({"table": module.model.table})["table"])
    with torch.no_grad():
        before = module.model(batch)
        for parameter in getattr(engine.optimizer, "persistent_parameters", []):
            parameter.all_gather()  # as it is after a step; `whole` has given it up
        with module.average.applied(module.model):
            inside = module.model(batch)
        after = module.model(batch)
        try:
            with module.average.applied(module.model):
                raise ValueError("evaluation failed")
        except ValueError:
            pass
    module.train()
    said = wrong(followed(module.model), live) if torch.equal(before, after) else "output differs after"
    print("CHECKED", title, "restored:", said, flush=True)
    print("CHECKED", title, "applied:", "same" if torch.equal(inside, alone(batch)) else "differs", flush=True)


def check_resume(engine: Any, names: Any, where: Path, title: str, variant: Any, ranks: Any) -> None:
    """A checkpoint, two steps, and the same two steps after loading it into another engine."""
    from pretrain.checkpoint.folders import folder_of
    from pretrain.checkpoint.reshape import Layout
    from pretrain.checkpoint.resume import load, open_verified
    from pretrain.checkpoint.save import Content, open_saver
    from pretrain.recipe.schema import Checkpoint, Zero

    saver = open_saver(where, ranks, Checkpoint(), None)
    state = {"step": STEPS, "world_size": ranks.world_size, "zero_stage": variant[1]}
    state["recipe"] = {"zero": asdict(Zero(stage=variant[1]))}
    expected = holds(engine, ranks)
    saver.save(engine, Content(STEPS, state, "run: {}\n", rank_state=engine.module.rank_state()))
    for number in (3, 4):
        step(engine, number, ranks)  # while the checkpoint is written
    saver.finish()
    saver.close()
    later = holds(engine, ranks) | {name: value.tensor for name, value in engine.module.rank_state().items()}
    if ranks.first:
        torch.save(expected, where / "expected.pt")
    again, names = build(*variant, 2, ranks)
    found = open_verified(folder_of(where, STEPS), ranks)
    load(again, found, Layout(ranks.world_size, variant[1]), names, again.module.rank_state())
    print("CHECKED", title, "loaded:", wrong(holds(again, ranks), expected), flush=True)
    rows = torch.arange(len(again.module.bank)) * ranks.world_size + ranks.rank + 200
    right = torch.equal(again.module.bank, rows) and again.module.noise.tolist() == [20 + ranks.rank] * 2
    right = right and again.module.queue[:, 0].tolist() == [0.25, 1.25, 2.25, 1.0, 1.0]
    print("CHECKED", title, "rank state:", "same" if right else "differs", flush=True)
    for number in (3, 4):
        step(again, number, ranks)
    resumed = holds(again, ranks) | {name: value.tensor for name, value in again.module.rank_state().items()}
    print("CHECKED", title, "resumed:", wrong(resumed, later), flush=True)


def read(folder: Path, ranks: Any, source: int) -> None:
    """Load the checkpoints of `source` ranks into engines of other stages."""
    from pretrain.checkpoint.folders import folder_of
    from pretrain.checkpoint.reshape import Layout
    from pretrain.checkpoint.resume import load, load_weights, open_verified

    pairs = [(old, new) for old, new in itertools.product(VARIANTS, VARIANTS) if old[0] == new[0]]
    # On one rank other pairs than on three.
    for old, new in pairs[2 + (ranks.world_size > 1) :: 5]:
        title = f"{old[0]} {old[1]}{' in shards' if old[2] else ''}"
        found = open_verified(folder_of(folder / title, STEPS), ranks)
        expected = torch.load(folder / title / "expected.pt")
        for weights_only in (False, True) if new[1] == 3 else (False,):  # which a test under stage 3 loads
            engine, names = build(*new, 2, ranks)
            if weights_only:
                load_weights(engine, found, Layout(ranks.world_size, new[1]), names)
            else:
                load(engine, found, Layout(ranks.world_size, new[1]), names, engine.module.rank_state())
            line = f"{source} x {title} -> {ranks.world_size} x stage {new[1]}{' weights' if weights_only else ''}:"
            print("CHECKED", line, wrong(holds(engine, ranks), expected), flush=True)
            if not weights_only:
                bank = torch.arange(len(engine.module.bank)) * ranks.world_size + ranks.rank + 200
                right = torch.equal(engine.module.bank, bank) and engine.module.noise.tolist() == [-2 - ranks.rank] * 2
                right = right and engine.module.queue[:, 0].tolist() == [0.25, 1.25, 2.25, 1.0, 1.0]
                print("CHECKED rank state of", line, "same" if right else "differs", flush=True)
