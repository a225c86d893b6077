"""The model card of an export: what was trained on what, how it went, and the recipe that does it again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint.folders import run_of, step_of
from pretrain.models.formats import recipe_text
from pretrain.recipe.schema import Recipe
from pretrain.runtime import storage
from pretrain.runtime.metrics import read_records
from pretrain.runtime.run_folder import RunFolder

#: File name under which model hubs look for it.
CARD = "README.md"
#: Metrics of a run that tell how good the weights are.
SHOWN = ("train/", "eval/")

#: Value and optimiser step of each metric.
Metrics = Mapping[str, tuple[Any, int]]


def write_card(
    dest: str, recipe: Recipe, source: Path, parameters: int, usage: str, library: str = "tubelet",
    task: str = "video-classification", tests: Mapping[str, float] | None = None,
) -> None:  # fmt: skip
    """Write README.md into an exported folder.

    Args:
        dest: folder, any fsspec URL.
        recipe: of the run.
        source: checkpoint that was exported; its run's metrics are read.
        parameters: of the exported model.
        usage: how to load it, Markdown.
        library: that loads the folder, as hubs call it.
        task: what the weights are for, as hubs call it.
        tests: scores of the test of this checkpoint.
    """
    metrics = dict(run_metrics(source))
    if tests:
        metrics |= {f"test/{name}": (value, step_of(source)) for name, value in tests.items()}
    text = model_card(recipe, source.name, parameters, usage, metrics, library, task)
    storage.write_bytes(storage.join(dest, CARD), text.encode())


def run_metrics(source: Path) -> Metrics:
    """Read the last training and validation metrics of a run up to a checkpoint; none for what is no checkpoint."""
    latest: dict[str, tuple[Any, int]] = {}
    root = run_of(source)
    if root is None:
        return latest
    for record in read_records(RunFolder(root).metrics, ("step",)):
        # The run may have gone on since: metrics of later steps are of other weights.
        if record["step"] <= step_of(source):
            latest |= {name: (value, record["step"]) for name, value in record.items() if name.startswith(SHOWN)}
    return latest


def model_card(
    recipe: Recipe, source: str, parameters: int, usage: str, metrics: Metrics, library: str, task: str
) -> str:
    """Write the card as Markdown, with the fields that model hubs read in front."""
    rows = {
        "model": f"{recipe.model.name}, {parameters:,} parameters",
        "weights": source,
        "input": f"{recipe.input.name}, {_input(recipe)}",
        "data": ", ".join(_source(name, recipe) for name in recipe.data.sources),
        "started from": recipe.run.init_weights or "random weights",
    }
    # Method and model are often of one name.
    tags = ", ".join(dict.fromkeys((recipe.objective.name, recipe.model.name, recipe.input.name)))
    return "\n".join(
        [
            *("---", f"library_name: {library}", f"pipeline_tag: {task}", f"tags: [{tags}]", "---", ""),
            *(f"# {recipe.run.name}", "", "| | |", "|---|---|"),
            *(f"| {name} | {text} |" for name, text in rows.items()),
            *("", "## Metrics", "", *_metric_lines(metrics)),
            *("", "## Use", "", usage),
            *("", "## Recipe", "", "```yaml", recipe_text(recipe).rstrip(), "```", ""),
        ]
    )


def _input(recipe: Recipe) -> str:
    return ", ".join(f"{name} {value}" for name, value, _ in recipe.input.describe())


def _source(name: str, recipe: Recipe) -> str:
    remark = recipe.input.describe_source(recipe.data.sources[name])
    return f"{name} ({remark})" if remark else name


def _metric_lines(metrics: Metrics) -> list[str]:
    if not metrics:
        return ["There is no record of training beside these weights."]
    rows = [
        f"| {name} | {value:.4g} | {step} |" if isinstance(value, float | int) else f"| {name} | {value} | {step} |"
        for name, (value, step) in sorted(metrics.items())
    ]
    return ["| metric | value | step |", "|---|---|---|", *rows]
