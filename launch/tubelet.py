"""All commands under one name, from any folder: tubelet COMMAND ...

Installed with the package as the command `tubelet`. A command is a file of launch/ and is run as that file is, so
`tubelet pack` and `python launch/pack.py` are the same program.
"""

import ast
import runpy
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent

USAGE = """\
usage: tubelet COMMAND ...
       tubelet COMMAND --help
       tubelet --version
       tubelet --completion bash|zsh

commands:
{commands}

On several GPUs a launcher starts one process for each: deepspeed --module launch.pretrain --recipe NAME key=value ...
exit codes: those of the command; 2 wrong usage
"""

#: Words behind `tubelet` and names behind `--recipe`; all else is a file.
COMPLETION = """\
_tubelet() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
    if [ "$COMP_CWORD" = 1 ]; then
        COMPREPLY=($(compgen -W "{commands} --version --completion" -- "$word"))
    elif [ "$before" = --recipe ]; then
        case ${{COMP_WORDS[1]}} in
        finetune | evaluate) COMPREPLY=($(compgen -W "{finetune}" -- "$word")) ;;
        *) COMPREPLY=($(compgen -W "{pretrain}" -- "$word")) ;;
        esac
    fi
}}
complete -o default -F _tubelet tubelet
"""


def commands() -> dict[str, Path]:
    """List the commands: names, and files that are run."""
    files = [path for path in LAUNCH.glob("*.py") if path.name != "__init__.py" and path != Path(__file__).resolve()]
    return {path.stem.replace("_", "-"): path for path in sorted([*files, LAUNCH / "slurm" / "submit.py"])}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, sys.argv by default; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    known = commands()
    match words:
        case [] | ["-h" | "--help", *_]:
            width = max(map(len, known)) + 2
            lines = [f"  {name:<{width}}{_summary(path)}" for name, path in known.items()]
            print(USAGE.format(commands="\n".join(lines)))
            return 0 if words else 2
        case ["--version", *_]:
            print(f"tubelet {metadata.version('tubelet')}")
            return 0
        case ["--completion", shell] if shell in ("bash", "zsh"):
            print(_completion(shell, list(known)), end="")
            return 0
        case [name, *rest] if name.replace("_", "-") in known:
            return _run(known[name.replace("_", "-")], rest)
    allowed = ", ".join([*known, "--version", "--completion bash|zsh"])
    print(f"tubelet: found {' '.join(words[:2])!r}, allowed: {allowed}", file=sys.stderr)
    return 2


def _run(path: Path, words: list[str]) -> int:
    """Run a file of launch/ as Python would, and return the code with which it leaves."""
    sys.argv = [str(path), *words]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as leave:
        if isinstance(leave.code, str):
            print(leave.code, file=sys.stderr)
            return 1
        return leave.code or 0
    return 0


def _summary(path: Path) -> str:
    """Return the first words of a file's docstring, without importing it: some take torch along."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].partition(":")[0]


def _completion(shell: str, names: list[str]) -> str:
    from pretrain.recipe.files import recipe_names

    script = COMPLETION.format(
        commands=" ".join(names), pretrain=" ".join(recipe_names()), finetune=" ".join(recipe_names("finetune"))
    )
    # zsh runs bash's completions once it is told to.
    return ("autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "") + script


if __name__ == "__main__":
    sys.exit(main())
