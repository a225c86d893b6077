"""Recipe files: their places, contents and line numbers."""

import contextlib
import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from pretrain.errors import RecipeError

#: recipes/ lies beside pretrain/ in a checkout and in an installation alike.
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
#: What takes the recipes of each of its folders.
COMMANDS = {"": "launch/pretrain.py", "finetune": "launch/finetune.py"}


#: Bytes of the largest file that is read as a recipe; ours have 10 kB when they are resolved.
LARGEST = 1 << 20

#: What a recipe may read of the environment, besides names that begin with TUBELET_. Recipes and runs are passed on,
#: and what they print is too: with any name allowed, a recipe of somebody else would show the reader's keys.
ENVIRONMENT = (
    "HOME", "USER", "TMPDIR", "SCRATCH", "WORK", "PROJECT", "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_TASK_ID",
    "SLURM_TMPDIR",
)  # fmt: skip
_NO_DEFAULT = "\0"


def _from_environment(name: str, default: Any = _NO_DEFAULT) -> Any:
    """Resolve `${oc.env:NAME,default}`; ValueError for names that recipes may not read."""
    if name not in ENVIRONMENT and not name.startswith("TUBELET_"):
        raise ValueError(
            f"recipes don't read {name} from the environment, only TUBELET_… and {', '.join(ENVIRONMENT)}; "
            f'give the value on the command line: key="${name}"'
        )
    if name not in os.environ and default == _NO_DEFAULT:
        raise ValueError(f"the environment has no {name}; set it, or write a default: ${{oc.env:{name},default}}")
    return os.environ.get(name, default)


# In the place of OmegaConf's own, so that nothing which a recipe can write leads around it.
OmegaConf.register_resolver("oc.env", _from_environment, replace=True)


@dataclass
class Layer:
    """One origin of values, a file or the command line; later layers win.

    Attributes:
        lines: line of each dotted key in the file.
        spelling: the same content with every value as it was spelt.
        whole: keys whose mapping replaces what lies below instead of adding to it. A file states `data.sources`
            whole, or the sources of its base would be mixed in.
    """

    origin: str
    content: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)
    spelling: dict[str, Any] = field(default_factory=dict)
    whole: frozenset[str] = frozenset({"data.sources"})

    def gives(self, key: str) -> bool:
        """Tell whether a dotted key has a value here."""
        content: Any = self.content
        for part in key.split("."):
            if not isinstance(content, dict) or part not in content:
                return False
            content = content[part]
        return True

    def where(self, key: str) -> str:
        """Format a dotted key as `file:line: key`, with the line of the nearest section above it that has one."""
        above = key
        while above and above not in self.lines:
            above = above.rpartition(".")[0]
        line = f":{self.lines[above]}" if above else ""
        return f"{self.origin}{line}: {key}"

    def spelt(self, key: str) -> Any:
        """Return the value of a dotted key as it was spelt: text, or a list or mapping of texts; None where unknown."""
        found: Any = self.spelling
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found


def recipe_names(folder: str = "") -> list[str]:
    """List the names that `--recipe` takes: the files of recipes/, or of a folder in it."""
    return sorted(path.stem for path in (RECIPES / folder).glob("*.yaml"))


def recipe_path(name_or_path: str, beside: Path | None = None, folder: str = "") -> Path:
    """Find a recipe's file: a name in recipes/, or a path (with a slash or .yaml), relative to `beside` if given.

    Args:
        name_or_path: as above.
        beside: folder that relative paths start in; None: the present one.
        folder: folder of recipes/ that names are looked up in.

    Raises:
        RecipeError: no such file; lists near names.
    """
    if "/" not in name_or_path and not name_or_path.endswith((".yaml", ".yml")):
        path = RECIPES / folder / f"{name_or_path}.yaml"
        if path.is_file():
            return path
        for other, command in COMMANDS.items():
            if other != folder and (RECIPES / other / f"{name_or_path}.yaml").is_file():
                raise RecipeError(
                    f"--recipe: {name_or_path!r} is a recipe of {command}; its plan: "
                    f"python {command} --recipe {name_or_path} --dry-run"
                )
        names = recipe_names(folder)
        near = difflib.get_close_matches(name_or_path, names, n=3, cutoff=0.5)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise RecipeError(
            f"--recipe: no recipe {name_or_path!r}; {meant}There is: {', '.join(names)}. "
            "A recipe of your own is given by its path, for example ./mine.yaml"
        )
    path = (beside or Path()) / Path(name_or_path).expanduser()
    if not path.is_file():
        elsewhere = f"; names without a slash and .yaml are looked up in {RECIPES / folder}"
        raise RecipeError(f"--recipe: no file {path}{'' if '/' in name_or_path else elsewhere}")
    return path


def read_layers(name_or_path: str, folder: str = "") -> list[Layer]:
    """Read the recipe's file, preceded by the file that its `base:` names."""
    path = recipe_path(name_or_path, folder=folder)
    layer = _read(path)
    base = layer.content.pop("base", None)
    if base is None:
        return [layer]
    below = _read(recipe_path(str(base), beside=path.parent, folder=folder))
    if "base" in below.content:
        raise RecipeError(
            f"{below.where('base')}: {below.origin} is itself the base of {layer.origin}, and bases go one level deep; "
            f"write what {layer.origin} needs from {below.content['base']!r} into it"
        )
    return [below, layer]


def override_layer(overrides: list[str]) -> tuple[Layer, list[str]]:
    """Read the command line's `key=value` words, and list what is wrong with them.

    Values are YAML, so `[1, 2]`, `null` and `1e-3` mean what they do in a file.
    """
    problems, good, spelling = [], [], {}
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key:
            problems.append(f"command line: {word!r} is neither an option nor key=value, such as optim.base_lr=1e-3")
            continue
        try:
            # Word by word: from_dotlist of all would stop at the first bad one and report nothing of the others.
            OmegaConf.from_dotlist([word])
            good.append(word)
            spelling[key] = yaml.load(value, Loader=yaml.BaseLoader)
        except UnicodeEncodeError:
            problems.append(f"command line: {word!r} is not in UTF-8")
        except yaml.YAMLError:
            problems.append(f"command line: {key}: {value!r} is not a YAML value; quote text with ' or \"")
        except (OmegaConfBaseException, ValueError) as error:
            problems.append(f"command line: {key}: {_refusal(error)}")
    # `data.sources={...}` replaces all sources as a file does; `data.sources.mine.shards=...` is another key, and adds.
    whole = frozenset(word.partition("=")[0] for word in good)
    layer = Layer("command line", _plain(OmegaConf.from_dotlist(good)), whole=whole)
    for key, spelt in spelling.items():
        _put(layer.spelling, key, spelt)
    return layer, problems


def _put(spelling: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    for part in above:
        below = spelling.get(part)
        spelling[part] = below if isinstance(below, dict) else {}
        spelling = spelling[part]
    spelling[last] = value


def program_of(path: Path) -> str | None:
    """Read which program a stored recipe is for; None where it does not say."""
    found = _read(path).content.get("program")
    return None if found is None else str(found)


def _read(path: Path) -> Layer:
    origin = _display(path)
    try:
        if path.stat().st_size > LARGEST:
            raise RecipeError(f"{origin}: {path.stat().st_size} bytes, at most {LARGEST} are read as a recipe")
        text = path.read_text(encoding="utf-8")
        # First, in Python: libyaml's end on a text that is nested deep is the process's.
        content = OmegaConf.create(text or "{}")
        # Parsed a second time, because OmegaConf keeps no line numbers.
        lines = _key_lines(_parsed(text, yaml.compose, "SafeLoader"))
        # A third time, with nothing but text in it: `001`, `on` and `1e3` are good names of runs and classes.
        spelling = _parsed(text, yaml.load, "BaseLoader")
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{origin}:{line}: not valid YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{origin}: can't be read: {error}") from error
    except OmegaConfBaseException as error:
        lines = _key_lines(_parsed(text, yaml.compose, "SafeLoader"))
        raise RecipeError(
            f"{origin}:{lines.get(error.full_key or '', 1)}: {error.full_key}: {_refusal(error)}"
        ) from error
    except ValueError as error:
        raise RecipeError(f"{origin}: {_refusal(error)}") from error
    except RecursionError as error:
        raise RecipeError(f"{origin}: can't be read: nested too deep") from error
    if not isinstance(content, DictConfig):
        raise RecipeError(f"{origin}: a recipe is a mapping of sections, this is a {type(content).__name__}")
    return Layer(origin, _plain(content), lines, spelling if isinstance(spelling, dict) else {})


def _parsed(text: str, how: Callable[..., Any], loader: str) -> Any:
    """Parse by libyaml, ten times as fast, where PyYAML has it; what it refuses is told by Python's parser."""
    if yaml.__with_libyaml__:
        with contextlib.suppress(yaml.YAMLError):
            return how(text, Loader=vars(yaml)[f"C{loader}"])
    return how(text, Loader=vars(yaml)[loader])


def _refusal(error: Exception) -> str:
    """Say what OmegaConf or Python can't make a value of, although it is YAML."""
    if isinstance(error, GrammarParseError):
        return "holds an incomplete ${...}, allowed: ${section.key} or ${oc.env:NAME}; a bare ${ is written \\${"
    return str(error).splitlines()[0]


def _plain(content: Any) -> dict[str, Any]:
    # Unresolved: `${data.root}` must see what a later layer gives.
    plain = OmegaConf.to_container(content, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _display(path: Path) -> str:
    """Shorten a path to what a person at this prompt would type."""
    resolved, here = path.resolve(), Path.cwd()
    return str(resolved.relative_to(here)) if resolved.is_relative_to(here) else str(resolved)


def _key_lines(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            lines[dotted] = key.start_mark.line + 1
            lines.update(_key_lines(value, f"{dotted}."))
    return lines
