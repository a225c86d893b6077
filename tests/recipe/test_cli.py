"""The command line: what it prints where, and its exit codes."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.commands import finetune
from pretrain.commands.pretrain import main
from pretrain.recipe.files import RECIPES


def test_print_check_and_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "demo", "--print", "run.seed=5"]) == 0
    assert "  seed: 5 " in capsys.readouterr().out
    assert main(["--local_rank=0", "run.seed=5", "--recipe", "demo", "--check", "run.name=x"]) == 0
    assert "no problems" in capsys.readouterr().out
    assert main(["--recipe", "vit_g_dual", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "1,026,306,560" in out and "1,011,610,752" in out and "241.6 GMAC" in out
    assert "no index.json in shards/k710" in out and "launch/pack.py" in out


def test_dry_run_says_which_index_is_damaged_and_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    entry = {"name": "a.tar", "samples": 8, "bytes": float("nan"), "sha256": ""}
    (tmp_path / "index.json").write_text(json.dumps({"version": 1, "fingerprint": "", "shards": [entry]}))
    assert main(["--recipe", "demo", "--dry-run", f"data.sources.camera.shards={tmp_path}"]) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if "found nan" in line)
    assert f"{tmp_path}/index.json: damaged entry" in told and "--index-only" in told


def test_check_reports_values_and_cross_checks_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "demo", "--check", "compute.dtype=fp8", "run.sed=1", "batch.micro=5"]) == 2
    error = capsys.readouterr().err
    assert "compute.dtype" in error and "did you mean 'seed'?" in error and "batch.micro: found 5" in error
    assert "Traceback" not in error


def test_bad_value_is_not_blamed_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "demo", "--check", "batch.samples=many"]) == 2  # the default, 2048, would fit no less
    assert capsys.readouterr().err.count("batch.samples") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--recipe", "demo", "--dryrun"], "did you mean --dry-run?"),
        (["--recipe", "demo", "--base_lr", "3"], "Values of the recipe are set with key=value"),
        (["--recipe", "demo", "--print", "--check"], "not allowed with"),
        (["--check"], "--recipe"),
        (["--recipe", "demo", "--check", "optim.base_lr", "3"], "neither an option nor key=value"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_a_commands_own_options_are_among_those_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune.main(["--recipe", "demo_finetune", "--tests", "last"]) == 2
    assert "did you mean --test?" in capsys.readouterr().err
    assert finetune.main(["--recipe", "demo_finetune", "--zzz"]) == 2
    error = capsys.readouterr().err
    assert "--test, --rescore" in error and "--resume" in error and "--local_rank" not in error


def test_other_ranks_stay_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["--recipe", "demo", "--dry-run"]) == 0
    assert main(["--recipe", "demo", "run.sed=3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_dry_run_starts_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pretrain.commands.pretrain import main; main(['--recipe', 'vit_g_dual', '--dry-run']); "
        "heavy = {'deepspeed', 'torch._dynamo', 'timm', 'torchvision', 'wandb', 'decord', 'av', 'webdataset'}; "
        "heavy &= set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], cwd=RECIPES.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - start < 30  # 2.6 s on an idle machine


def test_help_of_every_command_comes_without_loading_torch() -> None:
    """It took eight seconds where a recipe's section stood beside the code that it configures."""
    scripts = [path.read_text() for path in (RECIPES.parent / "launch").glob("*.py")]
    found = [re.search(r"from (\S+) import main", text) for text in scripts]
    # tubelet.py runs the other files, and lists them without an import.
    modules = sorted({"launch.tubelet", *(one[1] for one in found if one)})
    code = (
        "import contextlib, importlib, sys\n"
        f"for name in {modules}:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        importlib.import_module(name).main(['--help'])\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=RECIPES.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usage:") == len(modules) >= 10
