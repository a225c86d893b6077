"""Whether a run would be faster if its backward pass computed less again."""

from dataclasses import replace

from pretrain.objectives.base import method_of
from pretrain.plan.estimate import Estimate, Planner

#: Share of a step's time below which a roofline can't tell two ways apart.
TELLING = 0.02


def recomputation_advice(planner: Planner, plan: Estimate) -> list[str]:
    """Compare with the ways that recompute less, each with the largest micro-batch that fits it.

    Args:
        planner: of the recipe.
        plan: what it estimated.

    Returns:
        A line on the fastest way, where that is not the recipe's; none where the recipe recomputes nothing.
    """
    compute = planner.recipe.compute
    others = {True: ("selective", False), "selective": (False,)}.get(compute.activation_checkpointing, ())
    if plan.largest_micro == 0:
        return []
    found = {}
    for way in others:
        if way == "selective" and compute.compile:
            continue
        changed = replace(planner.recipe, compute=replace(compute, activation_checkpointing=way))
        other = Planner(method_of(changed), planner.gpu, planner.resources, planner.indices, planner.epoch_steps)
        estimate = other.estimate(plan.gpus)
        if estimate.largest_micro:
            found[str(way).lower()] = estimate
    if not found:
        return []
    way, best = min(found.items(), key=lambda item: item[1].times.total)
    saved = 1 - best.times.total / plan.times.total
    if saved < TELLING:
        return []
    return [
        f"compute.activation_checkpointing={way} with batch.micro={best.micro} fits and takes {saved:.0%} off the "
        f"step: {best.memory.total / 1e9:.1f} instead of {plan.memory.total / 1e9:.1f} GB"
    ]
