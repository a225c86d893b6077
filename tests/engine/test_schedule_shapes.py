"""Every published schedule of the systems' specifications, said in a recipe, against its formula written anew here."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.data.samples import Batch
from pretrain.engine.schedules import Schedule, build_schedule, pictures_every_steps
from pretrain.errors import RecipeError
from pretrain.objectives.base import Objective
from pretrain.recipe.check_optim import optim_problems, schedule_problems
from pretrain.recipe.load import load_recipe
from pretrain.recipe.rates import half_cosine
from pretrain.runtime.vision_ops import ensure_torchvision

Formula = Callable[[int], float]


def schedule_of(words: str, steps_per_epoch: int) -> Schedule:
    recipe = load_recipe("demo", ["optim.base_batch=256", *words.split()])
    assert schedule_problems(recipe) == [] == optim_problems(recipe)
    return build_schedule(recipe, steps_per_epoch)


def cosine_per_iteration(peak: float, epochs: float, warmup: float, per: int) -> Formula:
    """AdaptFormer and SNCLR, section 4: e = epoch + iteration / len; lr e / W where e < W, then half a cosine to 0."""

    def lr(step: int) -> float:
        e = step // per + step % per / per
        if e < warmup:
            return peak * e / warmup
        return peak * (1 + math.cos(math.pi * (e - warmup) / (epochs - warmup))) / 2

    return lr


def timm_cosine(peak: float, floor: float, start: float, length: int, warmup: int) -> Formula:
    """timm's own scheduler, its cosine not shifted by the warm-up (SparseFormer, GroupMixFormer, DeiT)."""
    ensure_torchvision()
    from timm.scheduler.cosine_lr import CosineLRScheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    timm = CosineLRScheduler(optimizer, length, lr_min=floor, warmup_lr_init=start, warmup_t=warmup, cycle_limit=1)
    return lambda position: timm._get_lr(position)[0]


def deit(peak: float, floor: float, start: float, epochs: int, warmup: int, per: int) -> Formula:
    """EViT section 4 and 8.9: epoch e + 1 runs with the value of e."""
    of_epoch = timm_cosine(peak, floor, start, epochs, warmup)
    return lambda step: of_epoch(max(0, step // per - 1))


def drops(peak: float, milestones: list[int], gamma: float) -> Formula:
    """torch's MultiStepLR, stepped per iteration (TDN section 6, MGSampler section 6)."""

    def lr(step: int) -> float:
        return peak * gamma ** len([milestone for milestone in milestones if step >= milestone])

    return lr


def evad(base: float, per: int) -> Formula:
    """EVAD section 4: 12 epochs, x 0.1 at 5 and 8, linear over 2 epochs from 2.5e-6 per iteration."""

    def lr(step: int) -> float:
        e = step / per
        if e < 2:
            return 2.5e-6 + (base - 2.5e-6) * e / 2
        return base * (1 if e < 5 else 0.1 if e < 8 else 0.01)

    return lr


def cycleacr(base: float) -> Formula:
    """CycleACR section 5: x 0.1 at iterations 30,000 and 40,000; linear warm-up over 2,000 from a quarter."""

    def lr(step: int) -> float:
        warm = 0.25 + 0.75 * step / 2000 if step < 2000 else 1.0
        return base * warm * 0.1 ** ((step >= 30_000) + (step >= 40_000))

    return lr


def tdn_gradual(base: float, per: int) -> Formula:
    """TDN section 6: the gradual warm-up there is begins at lr / 100; cosine with eta_min 1e-5."""

    def lr(step: int) -> float:
        if step < 3 * per:
            return base / 100 + (base - base / 100) * step / (3 * per)
        return 1e-5 + (base - 1e-5) * (1 + math.cos(math.pi * (step - 3 * per) / (25 * per - 3 * per))) / 2

    return lr


def uniad(base: float, warmup: int, total: int) -> Formula:
    """UniAD section 7."""

    def lr(step: int) -> float:
        if step < warmup:
            return base * (step + 1) / warmup
        return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    return lr


def cut(constant: int, decaying: int, per: int) -> Formula:
    """CUT section 4, zero-based epoch e."""
    return lambda step: 2e-4 * (1 - max(0, step // per + 1 - constant) / (decaying + 1))


def videomae(peak: float, floor: float, epochs: int, warmup: int, per: int, start: float = 0.0) -> Formula:
    """VideoMAE section 4: linspace(start, lr, W), then i = 0 ... n - 1 of half a cosine."""
    n = epochs * per - warmup
    values = [*np.linspace(start, peak, warmup)]
    values += [floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * i / n)) for i in range(n)]
    return lambda step: float(values[step])


COSINE_TO_ZERO = "optim.base_min_lr=0 schedule.warmup_ends=start"
ADAM = "optim.name=adam optim.scaled=none schedule.warmup_epochs=0 schedule.shape="

#: Specification: words of the recipe, steps an epoch, steps in all, formula.
PUBLISHED: dict[str, tuple[str, int, int, Formula]] = {
    "videomae pre-training": (
        "batch.samples=2048 optim.base_lr=6e-4 optim.base_min_lr=1e-5 schedule.epochs=20 schedule.warmup_epochs=3",
        7,
        140,
        videomae(6e-4 * 8, 1e-5 * 8, 20, 21, 7),
    ),
    "videomae warmup_steps and start_warmup_value": (
        "batch.samples=512 optim.base_lr=1e-3 optim.base_min_lr=1e-6 schedule.epochs=5 schedule.warmup_steps=17 "
        "optim.base_warmup_lr=1e-5",
        11,
        55,
        videomae(2e-3, 2e-6, 5, 17, 11, start=2e-5),
    ),
    "adaptformer video": (
        f"batch.samples=1024 optim.base_lr=0.1 {COSINE_TO_ZERO} schedule.epochs=90 schedule.warmup_epochs=10",
        3,
        270,
        cosine_per_iteration(0.4, 90, 10, 3),
    ),
    "adaptformer image": (
        f"batch.samples=1024 optim.base_lr=0.1 {COSINE_TO_ZERO} schedule.epochs=100 schedule.warmup_epochs=20",
        3,
        300,
        cosine_per_iteration(0.4, 100, 20, 3),
    ),
    "snclr": (
        f"batch.samples=4096 optim.base_lr=1.5e-4 {COSINE_TO_ZERO} schedule.epochs=300 schedule.warmup_epochs=40",
        5,
        1500,
        cosine_per_iteration(1.5e-4 * 16, 300, 40, 5),
    ),
    "snclr linear probe": (
        "batch.samples=1024 optim.base_lr=3 optim.base_min_lr=0 schedule.epochs=90 schedule.warmup_epochs=0 "
        "schedule.stepping=epoch",
        4,
        360,
        lambda step: 3 * 4 * 0.5 * (1 + math.cos(math.pi * (step // 4) / 90)),
    ),
    "evit from scratch": (
        "batch.samples=2048 optim.base_lr=5e-4 optim.base_batch=512 optim.base_min_lr=1e-5 optim.base_warmup_lr=1e-6 "
        "optim.scaled=peak schedule.epochs=300 schedule.warmup_epochs=5 schedule.stepping=epoch schedule.lag=1 "
        "schedule.warmup_ends=start schedule.decay_from_epoch=0",
        3,
        900,
        deit(2e-3, 1e-5, 1e-6, 300, 5, 3),
    ),
    "evit fine-tuning": (
        "batch.samples=2048 optim.base_lr=2e-5 optim.base_batch=512 optim.base_min_lr=2e-6 optim.scaled=peak "
        "schedule.epochs=30 schedule.warmup_epochs=0 schedule.stepping=epoch schedule.lag=1",
        3,
        90,
        deit(8e-5, 2e-6, 0.0, 30, 0, 3),
    ),
    "evad base": (
        "batch.samples=16 optim.base_lr=2.5e-5 optim.base_batch=16 optim.base_warmup_lr=2.5e-6 schedule.shape=steps "
        "schedule.epochs=12 schedule.milestones=[5,8] schedule.warmup_epochs=2 schedule.warmup_ends=start",
        9,
        108,
        evad(2.5e-5, 9),
    ),
    "evad large": (
        "batch.samples=8 optim.base_lr=1e-5 optim.scaled=none optim.base_warmup_lr=2.5e-6 schedule.shape=steps "
        "schedule.epochs=12 schedule.milestones=[5,8] schedule.warmup_epochs=2 schedule.warmup_ends=start",
        9,
        108,
        evad(1e-5, 9),
    ),
    "cycleacr slowfast": (
        "batch.samples=32 optim.base_lr=8e-4 optim.base_batch=32 optim.base_warmup_lr=2e-4 schedule.shape=steps "
        "schedule.steps=50000 schedule.milestone_steps=[30000,40000] schedule.warmup_steps=2000 "
        "schedule.warmup_ends=start",
        613,
        50_000,
        cycleacr(8e-4),
    ),
    "cycleacr swin": (
        "batch.samples=32 optim.base_lr=2.4e-3 optim.base_batch=32 optim.base_warmup_lr=6e-4 schedule.shape=steps "
        "schedule.steps=50000 schedule.milestone_steps=[30000,40000] schedule.warmup_steps=2000 "
        "schedule.warmup_ends=start",
        613,
        50_000,
        cycleacr(2.4e-3),
    ),
    "cycleacr videomae": (
        "batch.samples=128 optim.base_lr=2.5e-4 optim.base_min_lr=1e-6 schedule.epochs=20 schedule.warmup_epochs=5",
        7,
        140,
        videomae(1.25e-4, 5e-7, 20, 35, 7),
    ),
    "tdn something": (
        "batch.samples=64 optim.name=sgd optim.base_lr=0.01 optim.base_batch=64 schedule.shape=steps "
        "schedule.epochs=60 schedule.milestones=[30,45,55] schedule.warmup_epochs=0",
        5,
        300,
        drops(0.01, [150, 225, 275], 0.1),
    ),
    "tdn kinetics": (
        "batch.samples=128 optim.name=sgd optim.base_lr=0.02 optim.base_batch=128 schedule.shape=steps "
        "schedule.epochs=100 schedule.milestones=[50,75,90] schedule.warmup_epochs=0",
        5,
        500,
        drops(0.02, [250, 375, 450], 0.1),
    ),
    "tdn gradual warm-up, cosine": (
        "batch.samples=128 optim.name=sgd optim.base_lr=0.002 optim.scaled=none optim.base_warmup_lr=2e-5 "
        "optim.base_min_lr=1e-5 schedule.epochs=25 schedule.warmup_epochs=3 schedule.warmup_ends=start",
        6,
        150,
        tdn_gradual(0.002, 6),
    ),
    "mgsampler": (
        "batch.samples=48 optim.name=sgd optim.base_lr=0.0075 optim.base_batch=48 schedule.shape=steps "
        "schedule.epochs=50 schedule.milestones=[20,40] schedule.warmup_epochs=0 schedule.stepping=epoch",
        5,
        250,
        lambda step: 0.0075 * 0.1 ** ((step // 5 >= 20) + (step // 5 >= 40)),
    ),
    "sparseformer": (
        "batch.samples=1024 optim.base_lr=5e-4 optim.base_batch=512 optim.base_min_lr=5e-6 optim.base_warmup_lr=5e-7 "
        "schedule.epochs=300 schedule.warmup_epochs=20 schedule.warmup_ends=start schedule.decay_from_epoch=0",
        3,
        900,
        timm_cosine(1e-3, 1e-5, 1e-6, 900, 60),
    ),
    "groupmixformer": (
        "batch.samples=2048 optim.base_lr=5e-4 optim.base_batch=512 optim.base_min_lr=5e-6 optim.base_warmup_lr=5e-7 "
        "schedule.epochs=300 schedule.warmup_epochs=20 schedule.warmup_ends=start schedule.decay_from_epoch=0",
        2,
        600,
        timm_cosine(2e-3, 2e-5, 2e-6, 600, 40),
    ),
    "sparseformer bootstrap": (
        "batch.samples=1024 optim.base_lr=1e-3 optim.base_batch=1024 optim.base_min_lr=0 schedule.epochs=20 "
        "schedule.warmup_epochs=1",
        9,
        180,
        videomae(1e-3, 0.0, 20, 9, 9),
    ),
    "speed co-augmentation": (
        f"batch.samples=256 {ADAM}constant optim.base_lr=2e-4 optim.weight_decay=1e-5 schedule.epochs=30",
        4,
        120,
        lambda step: 2e-4,
    ),
    "speed co-augmentation, vit": (
        "batch.samples=256 optim.base_lr=1.5e-4 schedule.shape=constant schedule.epochs=30 schedule.warmup_epochs=1.5",
        4,
        120,
        lambda step: 1.5e-4 * min(1, step / 5),
    ),
    "speed co-augmentation, fine-tuning": (
        f"batch.samples=64 {ADAM}steps optim.base_lr=1e-4 schedule.gamma=0.3 schedule.milestones=[6,10,14] "
        "schedule.epochs=16",
        3,
        48,
        drops(1e-4, [18, 30, 42], 0.3),
    ),
    "tvtsv2": (
        "batch.samples=24 optim.scaled=none optim.base_lr=1e-4 optim.eps=1e-6 schedule.shape=steps schedule.epochs=10 "
        "schedule.milestones=[6,8] schedule.warmup_epochs=0",
        4,
        40,
        drops(1e-4, [24, 32], 0.1),
    ),
    "tagalign": (
        "batch.samples=2048 optim.base_lr=1e-3 optim.base_batch=4096 schedule.shape=constant schedule.steps=30001 "
        "schedule.warmup_epochs=0",
        37,
        30_001,
        lambda step: 1e-3 * 2048 / 4096,
    ),
    "uniad": (
        "batch.samples=96 optim.base_lr=5e-5 optim.scaled=none optim.base_min_lr=0 optim.weight_decay=0 "
        "schedule.epochs=10 schedule.warmup_steps=6000 schedule.warmup_ends=end",
        3001,
        30_010,
        uniad(5e-5, 6000, 30_010),
    ),
    "cut": (
        f"batch.samples=1 {ADAM}linear optim.base_lr=2e-4 optim.base_min_lr=0 optim.betas=[0.5,0.999] "
        "schedule.epochs=400 schedule.stepping=epoch schedule.decay_from_epoch=199",
        3,
        1200,
        cut(200, 200, 3),
    ),
    "fastcut": (
        f"batch.samples=1 {ADAM}linear optim.base_lr=2e-4 optim.base_min_lr=0 optim.betas=[0.5,0.999] "
        "schedule.epochs=200 schedule.stepping=epoch schedule.decay_from_epoch=149",
        3,
        600,
        cut(150, 50, 3),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedule(name: str) -> None:
    words, steps_per_epoch, total, formula = PUBLISHED[name]
    schedule = schedule_of(words, steps_per_epoch)
    assert schedule.total == schedule.last == total
    steps = range(total) if total < 2000 else sorted({*range(0, total, 997), *_edges(schedule)})
    found, expected = [schedule.lr(step) for step in steps], [formula(step) for step in steps]
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=0)


def _edges(schedule: Schedule) -> list[int]:
    marks = [0, schedule.warmup, *schedule.milestones, schedule.total - 1]
    return [step + by for step in marks for by in (-1, 0, 1) if 0 <= step + by < schedule.total]


def test_tdn_and_mgsampler_are_torchs_own_scheduler() -> None:
    words, per, total, _ = PUBLISHED["tdn something"]
    schedule = schedule_of(words, per)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    official = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30 * per, 45 * per, 55 * per], gamma=0.1)
    for step in range(total):
        assert schedule.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        official.step()


#: The line of a warm-up of 8 steps from 1 to 5 for each rule: first, second, last step.
ENDS = {"both": (1.0, 1 + 4 / 7, 5.0), "start": (1.0, 1.5, 4.5), "end": (1.5, 2.0, 5.0)}
#: What comes at the first step after the warm-up, at the middle and at the last of 40 steps, from 5 to 1.
AFTER = {
    "cosine": (5.0, 3.0, 1 + 2 * (1 + math.cos(math.pi * 31 / 32))),
    "linear": (5.0, 3.0, 5 - 4 * 31 / 32),
    "steps": (5.0, 2.5, 1.25),
    "constant": (5.0, 5.0, 5.0),
}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("shape", AFTER)
@pytest.mark.parametrize("length", ["schedule.warmup_epochs=1.6", "schedule.warmup_steps=8"])
def test_every_shape_after_every_warm_up(shape: str, ends: str, length: str) -> None:
    words = "schedule.milestones=[3,7.8] schedule.gamma=0.5" if shape == "steps" else ""
    schedule = schedule_of(
        f"optim.scaled=none optim.base_lr=5 optim.base_min_lr=1 optim.base_warmup_lr=1 schedule.epochs=8 {length} "
        f"schedule.shape={shape} schedule.warmup_ends={ends} {words}",
        steps_per_epoch=5,
    )
    assert schedule.total == 40 and schedule.warmup == 8
    assert [schedule.lr(step) for step in (0, 1, 7)] == pytest.approx(ENDS[ends], rel=1e-12)
    assert [schedule.lr(step) for step in (8, 24, 39)] == pytest.approx(AFTER[shape], rel=1e-12)


@pytest.mark.parametrize("ends", ENDS)
def test_warm_up_that_changes_with_the_epoch(ends: str) -> None:
    schedule = schedule_of(
        f"optim.scaled=none optim.base_lr=5 optim.base_warmup_lr=1 schedule.epochs=10 schedule.warmup_epochs=8 "
        f"schedule.stepping=epoch schedule.shape=constant schedule.warmup_ends={ends}",
        steps_per_epoch=3,
    )
    rates = [schedule.lr(step) for step in range(30)]
    assert rates == [rate for rate in rates[::3] for _ in range(3)], "one rate an epoch"
    assert [rates[0], rates[3], rates[21], rates[24]] == pytest.approx([*ENDS[ends], 5.0], rel=1e-12)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_peak_is_held_until_the_decay_begins(shape: str) -> None:
    words = f"optim.scaled=none optim.base_lr=1 schedule.shape={shape} schedule.epochs=10 schedule.warmup_epochs=1"
    schedule = schedule_of(f"{words} schedule.decay_from_epoch=6.5", steps_per_epoch=4)
    assert [schedule.lr(step) for step in range(3, 27)] == [1.0] * 24
    assert schedule.lr(27) < 1 and schedule.lr(39) > schedule.floor


def test_decay_that_is_not_shifted_goes_on_below_the_peak() -> None:
    words = "optim.scaled=none optim.base_lr=1 optim.base_min_lr=0 schedule.epochs=10 schedule.warmup_epochs=5"
    schedule = schedule_of(f"{words} schedule.decay_from_epoch=0", steps_per_epoch=4)
    assert schedule.lr(19) == 1.0 and schedule.lr(20) == pytest.approx(0.5)


def test_lag_in_steps_and_in_epochs() -> None:
    words = "schedule.epochs=6 schedule.warmup_epochs=2 schedule.warmup_ends=start"
    plain, late = schedule_of(words, 5), schedule_of(f"{words} schedule.lag=1", 5)
    assert [late.lr(step) for step in range(30)] == [plain.lr(max(0, step - 1)) for step in range(30)]
    plain = schedule_of(f"{words} schedule.stepping=epoch", 5)
    late = schedule_of(f"{words} schedule.stepping=epoch schedule.lag=2", 5)
    assert [late.lr(step) for step in range(30)] == [plain.lr(max(0, step - 10)) for step in range(30)]


def test_max_steps_cuts_every_shape_and_changes_no_rate() -> None:
    for shape in ("cosine", "linear", "constant", "steps schedule.milestones=[4,9]"):
        words = f"schedule.epochs=10 schedule.shape={shape}"
        whole, short = schedule_of(words, 7), schedule_of(f"{words} schedule.max_steps=33", 7)
        assert (short.last, short.total) == (33, 70)
        assert [short.lr(step) for step in range(33)] == [whole.lr(step) for step in range(33)]


def test_length_and_milestones_in_fractions_of_epochs() -> None:
    words = "schedule.shape=steps schedule.warmup_epochs=0 optim.scaled=none optim.base_lr=1"
    schedule = schedule_of(f"{words} schedule.epochs=0.29 schedule.milestones=[0.07,0.14]", 100)
    assert (schedule.total, schedule.milestones) == (29, (7, 14))  # 0.07 x 100 is 7.000000000000001
    assert [schedule.lr(step) for step in (0, 6, 7, 13, 14, 28)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_weight_decay_follows_half_a_cosine() -> None:
    """VideoMAE's --weight_decay_end: cosine_scheduler(start, end) over all steps, without warm-up."""
    schedule = schedule_of("optim.weight_decay=0.04 optim.weight_decay_end=0.4 schedule.epochs=10", 5)
    expected = [0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * i / 50)) for i in range(50)]
    np.testing.assert_allclose([schedule.weight_decay(step) for step in range(50)], expected, rtol=1e-12)
    assert schedule_of("optim.weight_decay=0.04", 5).weight_decay(7) is None


def test_pictures_come_where_somebody_draws_them() -> None:
    class Drawn(Objective):
        def pictures(self, batch: Batch) -> dict[str, torch.Tensor]:
            return {"video": batch["video"]}

    recipe, schedule = load_recipe("demo", ["log.pictures_every_steps=null"]), Schedule(7, 70, 70, 0, 1.0, 0.0)
    assert pictures_every_steps(recipe, schedule, Drawn()) == 7
    assert pictures_every_steps(recipe, schedule, Objective()) == 0


def test_half_cosine_is_the_momentum_of_snclrs_teacher() -> None:
    for e in (0, 0.25, 40, 150, 299.75):
        expected = 1 - 0.5 * (1 + math.cos(math.pi * e / 300)) * (1 - 0.99)
        assert half_cosine(0.99, 1, e / 300) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("schedule.warmup_steps=200 schedule.epochs=10", r"schedule.warmup_steps: 200 .* schedule.epochs: 10"),
        ("schedule.steps=30 schedule.warmup_epochs=6", r"schedule.warmup_epochs: 6.* schedule.steps: 30"),
        ("schedule.shape=steps schedule.milestone_steps=[10,50] schedule.epochs=10", "schedule.milestone_steps: the"),
        ("schedule.shape=steps schedule.milestones=[3,9] schedule.steps=45", "schedule.milestones: the last is at st"),
        (
            "schedule.shape=steps schedule.milestones=[1] schedule.warmup_steps=6",
            "the first is at step 5, within the 6",
        ),
        ("schedule.decay_from_epoch=9 schedule.steps=45", "schedule.decay_from_epoch: 9"),
    ],
)
def test_lengths_that_only_the_data_tells_are_refused(words: str, expected: str) -> None:
    recipe = load_recipe("demo", words.split())
    assert schedule_problems(recipe) == []
    with pytest.raises(RecipeError, match=expected):
        build_schedule(recipe, steps_per_epoch=5)
