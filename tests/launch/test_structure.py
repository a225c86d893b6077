"""Who may import whom, and how long things may get: read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pretrain", "finetune", "launch")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODULE_LINES, FUNCTION_LINES = 500, 80

BOTTOM = {"pretrain", "pretrain.errors"}
BASE = BOTTOM | {"pretrain.recipe", "pretrain.runtime"}
#: What the modules below a name may import, besides their own kind. launch -> finetune -> pretrain; inside pretrain
#: cli -> engine -> {objectives, models, data, checkpoint} -> {recipe, runtime} -> errors.
ALLOWED = {
    "pretrain.errors": BOTTOM,
    "pretrain.recipe": BOTTOM,
    "pretrain.runtime": BASE,
    "pretrain.models": BASE,
    "pretrain.data": BASE,
    "pretrain.checkpoint": BASE,
    # An objective's file goes with its model's file; masks are drawn by the data workers on its behalf.
    "pretrain.objectives": BASE | {"pretrain.models", "pretrain.samples.masks", "pretrain.data.randomness"},
    "pretrain.engine": {"pretrain"} - {"pretrain.commands.program"},
    "pretrain.plan": {"pretrain"} - {"pretrain.commands.program"},
    "pretrain.commands.program": {"pretrain"},
    "pretrain": {"pretrain"},
    "finetune": {"finetune", "pretrain"},
    "launch": {"launch", "finetune", "pretrain"},
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Our own modules that a file imports, also inside functions, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found = [node.module or ""]
            if node.module in PACKAGES or (node.module or "").startswith("pretrain."):
                # `from pretrain.data import masks` names a module, `from pretrain.samples.masks import draw` does not.
                below = [f"{node.module}.{alias.name}" for alias in node.names]
                found = [
                    name if (ROOT / name.replace(".", "/")).with_suffix(".py").exists() else node.module or ""
                    for name in below
                ]
        else:
            continue
        yield from ((node.lineno, name) for name in found if name.split(".")[0] in PACKAGES)


def within(name: str, above: str) -> bool:
    return name == above or name.startswith(f"{above}.")


def may_import(importer: str, imported: str) -> bool:
    own = max((name for name in ALLOWED if within(importer, name)), key=len)
    if within(imported, own) and own != "pretrain":
        return True
    if own in ("pretrain.engine", "pretrain.plan"):
        return within(imported, "pretrain") and not within(imported, "pretrain.commands.program")
    exact = {"pretrain"} if own not in ("pretrain.commands.program", "pretrain", "finetune", "launch") else set()
    return any(imported == name if name in exact else within(imported, name) for name in ALLOWED[own])


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_downwards(path: Path) -> None:
    importer = module_name(path)
    wrong = [
        f"{path}:{line}: {importer} imports {name}" for line, name in imports(path) if not may_import(importer, name)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("pretrain.recipe.load", "pretrain.models.videomae", False),
        ("pretrain.recipe.load", "pretrain.runtime.storage", False),
        ("pretrain.data.stream", "pretrain.models.videomae", False),
        ("pretrain.models.videomae", "pretrain.samples.masks", False),
        ("pretrain.objectives.videomae", "pretrain.samples.masks", True),
        ("pretrain.objectives.videomae", "pretrain.data.stream", False),
        ("pretrain.engine.loop", "pretrain.commands.program", False),
        ("pretrain.engine.loop", "pretrain.data.stream", True),
        ("pretrain.engine.loop", "finetune.tasks", False),
        ("pretrain.commands.program", "pretrain.engine.loop", True),
        ("pretrain.commands.program", "finetune", False),
        ("finetune.classification", "launch.pretrain", False),
        ("finetune.classification", "pretrain.models.videomae", True),
        ("launch.pretrain", "pretrain.commands.program", True),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MODULE_LINES, f"{path}: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{path}:{node.lineno}: {node.name} has {lines} lines"
