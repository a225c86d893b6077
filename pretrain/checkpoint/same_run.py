"""Comparison of a run's recipe with the one it was started with: which differences let the run go on."""

from dataclasses import asdict, replace
from typing import Any

from pretrain.errors import CheckpointError
from pretrain.recipe.load import COMPONENTS
from pretrain.recipe.schema import Recipe

#: Keys, or sections, that change speed, place or what is written, but not what is learnt.
HARMLESS = (
    "batch.micro",
    "batch.ranks",
    "checkpoint",
    "compute.activation_checkpointing",
    "compute.compile",
    "compute.matmul",
    "data.affinity",
    "data.bad_attempts",
    "data.bad_minimum",
    "data.bad_rate",
    "data.cache_dir",
    "data.cache_gb",
    "data.deadline_s",
    "data.prefetch",
    "data.readahead",
    "data.root",
    "data.workers",
    "evaluate",
    "guard",
    "health",
    "log",
    # Compared by hashes of the weights (`frozen_notes`), which may be moved.
    "objective.held_out",
    "objective.teacher.weights",
    "run.dir",
    "run.init_averaged",
    "run.init_weights",
    "run.name",
    "run.time_limit_minutes",
    "schedule.max_steps",
    "watchdog",
    "zero",
)


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to dotted keys; lists stay values."""
    items: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        items |= flat(value, f"{name}.") if isinstance(value, dict) else {name: _plain(value)}
    return items


def _plain(value: Any) -> Any:
    # JSON gives lists for tuples: the same betas would count as a difference, and no run could go on.
    return list(value) if isinstance(value, tuple) else value


def is_harmless(key: str) -> bool:
    """Tell whether a run goes on when this key differs. Where a source lies may change: its fingerprint is compared."""
    if key.startswith("data.sources.") and key.endswith((".shards", ".val", ".test", ".expected_samples")):
        return True
    # With the dot: the entry `log` must not let a key that only begins like it pass.
    return any(key == entry or key.startswith(entry + ".") for entry in HARMLESS)


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Find the dotted keys whose values differ, with the old and the new value."""
    old, new = flat(before), flat(now)
    return {
        key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }


def _new_keys(before: dict[str, Any], recipe: Recipe) -> set[str]:
    """Find keys that the program has learnt since and that stand at their defaults.

    Those are what it did before, but for `ema.warmup` (docs/decisions.md).
    """
    components = {name: type(getattr(recipe, name))() for name in COMPONENTS}
    blank = replace(type(recipe)(), **components)
    old, now = flat(before), flat(asdict(recipe))
    return {key for key, value in flat(asdict(blank)).items() if key not in old and now.get(key) == value}


def check_same_run(before: dict[str, Any], recipe: Recipe, where: str) -> list[str]:
    """Compare the recipe stored in a checkpoint with the present one; returns the harmless differences.

    Raises:
        CheckpointError: lists every difference that would make it another run.
    """
    added = _new_keys(before, recipe)
    lines = {
        key: f"{key}: {old!r} -> {new!r}"
        for key, (old, new) in differences(before, asdict(recipe)).items()
        if key not in added
    }
    serious = [line for key, line in lines.items() if not is_harmless(key)]
    if serious:
        raise CheckpointError(
            "\n  - ".join([f"{where} belongs to another recipe; these keys change what is learnt:", *serious])
            + "\nGive the old values to continue, or another run.dir (or run.name) to start a new run "
            "(run.init_weights takes over the weights)"
        )
    return [line for key, line in lines.items() if is_harmless(key)]
