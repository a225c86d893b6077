"""Exit codes of every command: 2 for wrong usage, whoever finds it, and told in --help."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: tubelet.py starts the others, and leaves as they do.
COMMANDS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if path.stem not in ("__init__", "tubelet"))


def main_of(command: str) -> Callable[[list[str]], int]:
    """What a file in launch/ calls."""
    (module,) = re.findall(r"from ([\w.]+) import main\b", (ROOT / "launch" / f"{command}.py").read_text())
    main: Callable[[list[str]], int] = importlib.import_module(module).main
    return main


def code_of(command: str, words: list[str]) -> int:
    try:
        return main_of(command)(words)
    except SystemExit as leave:
        return int(leave.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_the_codes_and_an_unknown_option_is_wrong_usage(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(command, ["--help"]) == 0
    assert re.search(r"exit codes?: 0 .*\b1 .*\b2 wrong", capsys.readouterr().out)
    assert code_of(command, ["--no-such-option"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "predict clip.mp4 --weights x.onnx --keep-rate 0.5",
        "predict clip.mp4 --weights x --top 0",
        "replay runs/none 3 --clips 0",
        "reconstruct runs/none shards --pictures -1",
        "zero_shot runs/none shards --micro 0",
        "plan --recipe demo --gpus 0",
        "plan --recipe demo --gpus 2 batch.samples=0",
        "evaluate --recipe demo_finetune --epochs 0",
        "doctor --recipe no_such_recipe",
        "motion_index shards --workers -1",
        "pack only_one_place",
        "finetune --recipe demo_finetune --ensemble runs/one --rescore runs/one",
    ],
)
def test_values_that_can_not_be_meant_are_wrong_usage(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *options = words.split()
    assert code_of(command, options) == 2
    assert capsys.readouterr().err.strip(), "and said why"


@pytest.mark.parametrize("words", ["predict clip.mp4 --weights none", "export none out", "reconstruct none shards",
                                   "zero_shot none shards", "replay none 1"])  # fmt: skip
def test_what_is_not_there_is_a_failure(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command, *options = words.split()
    assert code_of(command, options) == 1
