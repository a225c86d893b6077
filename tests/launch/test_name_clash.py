"""launch/pretrain.py finds the package pretrain, not itself, however it is started."""

import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

import finetune
import launch
import pretrain

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.py") if path.name != "__init__.py")
#: Those that hide a package where their folder comes first.
HIDING = ("pretrain.py", "finetune.py")
CHECK = ["--recipe", "demo", "--check"]


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_packages_are_those_of_the_checkout() -> None:
    for package in (pretrain, finetune, launch):
        assert package.__file__ == str(ROOT / package.__name__ / "__init__.py")


def test_no_package_below_tests() -> None:
    # tests/extensions/files are copied into another tree before they are imported.
    packages = {path for path in (ROOT / "tests").rglob("__init__.py") if "extensions/files" not in path.as_posix()}
    assert not packages, "tests/pretrain/__init__.py would hide the package pretrain"


@pytest.mark.parametrize(
    ("script", "where"),
    [*product(SCRIPTS, ["elsewhere"]), *product(HIDING, ["root", "launch"])],
)
def test_script_as_a_file(script: str, where: str, tmp_path: Path) -> None:
    cwd = {"elsewhere": tmp_path, "root": ROOT, "launch": ROOT / "launch"}[where]
    result = run(sys.executable, str(ROOT / "launch" / script), "--help", cwd=cwd)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout


@pytest.mark.parametrize(
    "command",
    [
        [str(ROOT / "launch/pretrain.py")],
        ["launch/pretrain.py"],
        ["-P", "launch/pretrain.py"],
        ["-m", "launch.pretrain"],
        ["-m", "pretrain.commands.pretrain"],
    ],
)
def test_pretrain_started_from_the_root(command: list[str]) -> None:
    """--help comes from the package: nothing of it is in the script."""
    result = run(sys.executable, *command, "--help", cwd=ROOT)
    assert (result.returncode, "--dry-run" in result.stdout) == (0, True), result.stderr


def test_pretrain_from_another_folder_with_that_folder_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "pretrain.py").write_text("raise SystemExit('the wrong pretrain')\n")
    result = run(sys.executable, str(ROOT / "launch/pretrain.py"), *CHECK, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [["launch/pretrain.py"], ["--module", "launch.pretrain"]])
def test_under_the_deepspeed_launcher(command: list[str]) -> None:
    launcher = Path(sys.executable).with_name("deepspeed")
    arguments = ["--num_accelerators", "2", "--master_port", "29713"]
    result = run(
        sys.executable, str(launcher), *arguments, *command, *CHECK, cwd=ROOT, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("demo: no problems found") == 1, "one of two ranks answers"


def test_wrong_recipe_under_the_launcher_is_told_once() -> None:
    launcher = Path(sys.executable).with_name("deepspeed")
    arguments = ["--num_accelerators", "2", "--master_port", "29714", "launch/pretrain.py", *CHECK, "run.sed=1"]
    result = run(sys.executable, str(launcher), *arguments, cwd=ROOT, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    assert result.returncode == 2
    assert result.stderr.count("did you mean 'seed'?") == 1


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_spawned_data_workers_see_the_package(method: str, tmp_path: Path) -> None:
    """The script itself, above a stand-in package whose main starts a worker as a DataLoader does."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "pretrain"
    package.mkdir()
    (package / "commands").mkdir()
    (package / "__init__.py").touch()
    (package / "commands" / "__init__.py").touch()
    (package / "worker.py").write_text(
        "import sys, pretrain\n"
        "def work():\n"
        "    main = sys.modules['__main__'].__dict__\n"
        "    print(pretrain.__file__, 'pretrain.commands.pretrain' in sys.modules, main.get('main'), flush=True)\n"
    )
    (package / "commands" / "pretrain.py").write_text(
        "import multiprocessing\n"
        "from pretrain import worker\n"
        "def main():\n"
        f"    process = multiprocessing.get_context('{method}').Process(target=worker.work)\n"
        "    process.start()\n"
        "    process.join()\n"
        "    return process.exitcode\n"
    )
    result = run(sys.executable, str(tmp_path / "launch/pretrain.py"), cwd=ROOT / "launch")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(package / "__init__.py"), "False", "None"], (
        "a worker imports no more than it needs"
    )


def test_importing_a_script_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(sys.path)
    monkeypatch.delitem(sys.modules, "launch.pretrain", raising=False)
    import launch.pretrain

    assert sys.path == before
    assert not hasattr(launch.pretrain, "main")
