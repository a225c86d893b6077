"""A wheel, far from the checkout: all commands as `tubelet COMMAND`, recipes and templates inside."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launch.tubelet import commands, main

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pretrain", "finetune", "launch", "recipes")
CLIPS = ROOT / "tests/assets/actions/manifest.csv"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that a wheel of this checkout was unpacked into."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A copy, or the build's own folders would lie in the checkout.
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "."]
    subprocess.run([*build, "--wheel-dir", str(folder)], cwd=source, check=True)
    shutil.rmtree(source)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def tubelet(site: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command as its console script does; the wheel's packages come before the checkout's."""
    # The environment's own copy of the package is an editable one, found behind PYTHONPATH.
    environ = os.environ | {"PYTHONPATH": str(site), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    script = "import sys; from launch.tubelet import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", script, *words], cwd=cwd, env=environ, capture_output=True, text=True, timeout=300
    )


def test_what_a_wheel_holds(installed: Path) -> None:
    for package in PACKAGES:
        inside = {path.relative_to(installed) for path in (installed / package).rglob("*") if path.is_file()}
        there = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*") if path.is_file()}
        missing = {path for path in there - inside if "__pycache__" not in path.parts}
        assert missing <= {Path("launch/demo.sh")}, "a script of the checkout, on its own videos"
    [metadata] = installed.glob("tubelet-*.dist-info")
    assert (metadata / "licenses" / "LICENSE").is_file()
    assert "tubelet = launch.tubelet:main" in (metadata / "entry_points.txt").read_text()


def test_from_videos_to_a_plan(installed: Path, tmp_path: Path) -> None:
    """The way of the demo's first steps, in a folder that has nothing but the user's."""
    words = [str(CLIPS), "shards/actions", "--where", "who=woman", "--where", "tone=dark", "--copy"]
    packed = tubelet(installed, "pack", *words, cwd=tmp_path)
    assert packed.returncode == 0 and (tmp_path / "shards/actions/index.json").exists(), packed.stderr
    recipe = ["--recipe", "demo", "data.root=shards", "data.sources={actions: {shards: shards/actions}}"]
    planned = tubelet(installed, "pretrain", *recipe, "--dry-run", cwd=tmp_path)
    assert planned.returncode == 0 and "actions" in planned.stdout, planned.stderr
    assert tubelet(installed, "pretrain", "--recipe", "demmo", "--check", cwd=tmp_path).returncode == 2
    submitted = tubelet(installed, "submit", "pretrain", *recipe, "run.dir=/shared/run", "--print", cwd=tmp_path)
    assert f"TUBELET_HOME={installed}" in submitted.stdout, submitted.stderr
    assert f"{installed}/launch/slurm/pretrain.sbatch" in submitted.stdout


def test_a_word_that_is_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pakc", "x"]) == 2 and "'pakc x', allowed: doctor" in capsys.readouterr().err
    assert main([]) == 2 and main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in commands())
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("tubelet 0.")


@pytest.mark.skipif(shutil.which("bash") is None, reason="completes in bash")
def test_completion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "bash"]) == 0
    script = capsys.readouterr().out
    for typed, number, expected in (("pa", 1, "pack"), ("finetune --recipe vit_g_k7", 3, "vit_g_k710")):
        words = " ".join(["tubelet", typed])
        asked = f"{script}\nCOMP_WORDS=({words}); COMP_CWORD={number}; _tubelet; echo ${{COMPREPLY[@]}}"
        found = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True).stdout
        assert found.split() == [expected], (typed, found)
