"""Who may import whom, what is named once, and how long things may get: read from the source."""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pretrain", "finetune", "launch")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODULE_LINES, FUNCTION_LINES = 500, 80

#: Rooms of pretrain/, uppermost first; a room imports from those below it, and none from its neighbours.
FLOORS = (
    ("commands",),
    ("doctor", "trained"),
    ("plan",),
    ("engine",),
    ("objectives",),
    ("samples", "models", "guards"),
    ("data", "checkpoint", "metrics"),
    ("recipe", "runtime"),
    ("errors",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
#: Neighbours that may be imported: the watchdog takes its section of the recipe.
NEIGHBOURS = {("pretrain.runtime.watchdog", "recipe")}
#: Rooms of pretrain/ that are given sections of a recipe and never all of it.
SECTIONS_ONLY = {"data", "guards", "metrics", "runtime", "samples"}
#: Names that several modules have: contracts, entries of tasks, and what a recipe names in two sections.
SHARED_MODULES = {"__init__", "base", "task", "config", "videomae", "clip", "tvtsv2"}
#: `Config` is what a recipe's component has; a section of the recipe is called as what it describes.
SHARED_CLASSES = {"Config", "Prompts", "Run", "Schedule", "Watchdog"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[1] if parts[0] == "pretrain" else ""


def imports(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """Our own modules that statements import, with the line."""
    for node in nodes:
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            # `from pretrain.samples import masks` names a module, `from pretrain.samples.masks import draw` does not.
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if is_module(name) else node.module or "" for name in below]
        else:
            continue
        yield from ((node.lineno, name) for name in found if name.split(".")[0] in PACKAGES)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def may_import(importer: str, imported: str) -> bool:
    own, other = importer.split("."), imported.split(".")
    if own[0] != "pretrain" or other[0] != "pretrain":
        return PACKAGES.index(other[0]) <= PACKAGES.index(own[0])
    if len(other) == 1 or (len(own) > 1 and own[1] == other[1]):
        return True
    return len(own) > 1 and (FLOOR_OF[other[1]] > FLOOR_OF[own[1]] or (importer, other[1]) in NEIGHBOURS)


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Modules that import one another in a circle, if any do."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def named_twice(names: Iterable[tuple[str, str]], shared: set[str]) -> dict[str, list[str]]:
    """Names of (name, place) that several places have, less those that may be shared."""
    places = defaultdict(list)
    for name, place in names:
        places[name].append(place)
    return {name: found for name, found in places.items() if len(found) > 1 and name not in shared}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_downwards(path: Path) -> None:
    """Also inside functions and for type checkers; the one way up is recipe/components.py, by a recipe's names."""
    importer = module_name(path)
    found = imports(ast.walk(ast.parse(path.read_text())))
    wrong = [f"{path}:{line}: {importer} imports {name}" for line, name in found if not may_import(importer, name)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("pretrain.recipe.load", "pretrain.models.videomae", False),
        ("pretrain.recipe.load", "pretrain.runtime.storage", False),
        ("pretrain.runtime.storage", "pretrain.recipe.schema", False),
        ("pretrain.runtime.watchdog", "pretrain.recipe.schema", True),
        ("pretrain.runtime.run_folder", "pretrain.recipe.show", False),
        ("pretrain.runtime.run_folder", "pretrain.data.index", False),
        ("pretrain.errors", "pretrain.recipe.schema", False),
        ("pretrain.data.stream", "pretrain.samples.clip", False),
        ("pretrain.data.stream", "pretrain.checkpoint.save", False),
        ("pretrain.models.videomae", "pretrain.samples.masks", False),
        ("pretrain.samples.clip", "pretrain.data.samples", True),
        ("pretrain.objectives.videomae", "pretrain.samples.masks", True),
        ("pretrain.objectives.videomae", "pretrain.engine.loop", False),
        ("pretrain.engine.loop", "pretrain.plan.dry_run", False),
        ("pretrain.engine.loop", "pretrain.guards.results", True),
        ("pretrain.engine.loop", "finetune.recipe", False),
        ("pretrain.trained.load_run", "pretrain.doctor.examine", False),
        ("pretrain.trained.load_run", "pretrain.engine.build", True),
        ("pretrain.plan.dry_run", "pretrain.trained.load_run", False),
        ("pretrain.commands.program", "pretrain.engine.loop", True),
        ("pretrain.commands.program", "finetune", False),
        ("finetune.classification.task", "launch.pretrain", False),
        ("finetune.classification.task", "pretrain.models.videomae", True),
        ("launch.pretrain", "pretrain.commands.pretrain", True),
    ],
)
def test_the_rule_of_imports(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import pretrain.errors
from pretrain.samples import masks, clip
from pretrain.samples.masks import draw
if TYPE_CHECKING:
    from finetune.recipe import TuneRecipe
def late():
    import launch.doctor, torch
"""
    assert list(imports(ast.walk(ast.parse(source)))) == [
        (2, "pretrain.errors"),
        (3, "pretrain.samples.masks"),
        (3, "pretrain.samples.clip"),
        (4, "pretrain.samples.masks"),
        (6, "finetune.recipe"),
        (8, "launch.doctor"),
    ]


def test_rooms_take_their_sections() -> None:
    paths = [path for path in MODULES if room_of(path) in SECTIONS_ONLY]
    wrong = [str(path) for path in paths if "Recipe" in names_of(path.read_text(), "pretrain.recipe.schema")]
    assert paths and not wrong


def names_of(source: str, module: str) -> set[str]:
    """Names that a source imports from a module."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module == module]
    return {alias.name for node in nodes for alias in node.names}


def test_names_are_found_wherever_they_stand() -> None:
    source = """
from a.b import C, D as E
from a.c import F
def late():
    from a.b import G
"""
    assert names_of(source, "a.b") == {"C", "D", "G"}


def test_every_room_has_its_floor() -> None:
    there = {
        path.stem for path in (ROOT / "pretrain").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert there - {"__init__", "__main__"} == set(FLOOR_OF)


def test_no_circle_of_imports() -> None:
    graph = {
        module_name(path): {name for _, name in imports(ast.parse(path.read_text()).body)} - {module_name(path)}
        for path in MODULES
    }
    assert not circle(graph)


def test_the_rule_of_circles() -> None:
    assert not circle({"a": ["b", "c"], "b": ["c"]})
    assert set(circle({"a": ["b"], "b": ["c"], "c": ["b"]})) == {"b", "c"}


def test_modules_are_named_once() -> None:
    """A command may be called as what it runs."""
    names = [(path.stem, module_name(path)) for path in MODULES if path.parts[-2] not in ("commands", "launch")]
    assert not named_twice(names, SHARED_MODULES)


def test_classes_are_named_once() -> None:
    classes = [
        (node.name, module_name(path))
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert not named_twice(classes, SHARED_CLASSES)


def test_the_rule_of_names() -> None:
    names = [("Config", "a"), ("Config", "b"), ("Place", "a"), ("Place", "c"), ("Span", "a")]
    assert named_twice(names, {"Config"}) == {"Place": ["a", "c"]}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MODULE_LINES, f"{path}: split it"
    for name, line, lines in functions(text):
        assert lines <= FUNCTION_LINES, f"{path}:{line}: {name} has {lines} lines"


def functions(source: str) -> Iterator[tuple[str, int, int]]:
    """Name, line and length of every function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1


def test_lengths_of_functions() -> None:
    assert list(functions("class A:\n    async def f(self):\n        x = 1\n\n        return x\n")) == [("f", 2, 4)]


def calls(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


#: What reads more than was meant from a file of a stranger, and what reads it safely.
UNSAFE = {
    "json.loads": "runtime.untrusted.parse_json",
    "json.load": "runtime.untrusted.parse_json",
    "pickle.load": "checkpoint.deepspeed_files.load_file",
    "pickle.loads": "checkpoint.deepspeed_files.load_file",
    "eval": "nothing",
    "exec": "nothing",
}


def test_files_are_read_within_limits() -> None:
    unsafe = {
        f"{module_name(path)}: {name} instead of {UNSAFE[name]}"
        for path in MODULES
        if path.name != "untrusted.py"
        for name in calls(ast.parse(path.read_text()))
        if name in UNSAFE
    }
    assert not unsafe
    loads = [ast.unparse(node) for path in MODULES for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]  # fmt: skip
    assert loads and all("weights_only=True" in call for call in loads), loads


def test_calls_are_found() -> None:
    assert set(calls(ast.parse("json.loads(x)\nself.a(b())"))) == {"json.loads", "self.a", "b"}
