"""Features of pre-training runs, judged without a recipe of fine-tuning: clips, pictures of a contrastive method."""

import io
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch import Tensor

from finetune.commands.evaluate import main
from finetune.probe.run_features import run_features
from finetune.probe.scores import retrieved
from pretrain.data.samples import Batch, Samples
from pretrain.errors import DataError, WeightsError
from pretrain.models.formats import export_safetensors
from pretrain.objectives.base import Method, Objective, method_of
from pretrain.recipe.load import load_recipe
from pretrain.runtime.process_group import Ranks
from pretrain.samples.image_views import Config, ImageViews
from pretrain.trained.load_run import Trained
from tests.toy_shards import ROOT, index

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
PRETRAINING = """\
model: {name: videomae, size: custom, patch_size: 16, dim: 32, depth: 1, heads: 2, mlp_ratio: 2,
        decoder_dim: 32, decoder_depth: 1, decoder_heads: 2}
objective: {name: videomae}
input: {frames: 4, stride: 2, height: 32, width: 32, decoder: pyav}
data: {sources: {toy: {shards: SHARDS}}}
"""


class Colours(Objective):
    """Features are known: the mean colour of a row."""

    def features(self, batch: Batch) -> Tensor:
        assert batch["video"].shape[1:] == (1, 12, 12, 3) and not self.training
        return batch["video"].float().mean((1, 2, 3))


class OfPictures(Method):
    """A contrastive method as far as its features are concerned."""

    def __init__(self, recipe: Any, objective: Objective) -> None:
        super().__init__(recipe)
        self.objective = objective

    def problems(self) -> list[str]:
        return []

    def samples(self) -> Samples:
        return ImageViews(Config(height=12, width=12), 0)

    def build(self) -> Objective:
        return self.objective

    def cost(self) -> Any:
        raise NotImplementedError


#: Labels of the sets of pictures.
SETS = {
    "train": [number % 3 for number in range(30)],
    "val": [0, 1, 2, None, 2, 0],
    "strange": [0, 11],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pictures")
    for name, labels in SETS.items():
        write_pictures(folder / name, labels)
    index(*(folder / name for name in SETS))
    return {name: str(folder / name) for name in SETS}


def write_pictures(folder: Path, labels: Iterable[Any]) -> None:
    """Pictures coloured by label, 20 x 17 pixels."""
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "pictures-000000.tar")) as shard:
        for number, label in enumerate(labels):
            pixels = np.random.default_rng(number).integers(0, 60, (20, 17, 3), dtype=np.uint8)
            pixels[..., int(label or 0) % 3] += 150
            stored = io.BytesIO()
            Image.fromarray(pixels).save(stored, "png")
            facts = {} if label is None else {"label": label}
            shard.write({"__key__": f"{number:03d}", "png": stored.getvalue(), "json": facts})


def trained(toy: Any, objective: Objective) -> Trained:
    recipe = load_recipe("demo")
    return Trained(OfPictures(recipe, objective), objective.eval(), toy.folder)


def test_pictures_are_judged_by_what_the_method_says(toy: Any, shards: dict[str, str]) -> None:
    with pytest.raises(DataError, match="1 of its classes have no training sample in .*: 11"):
        run_features(trained(toy, Colours()), shards["train"], shards["strange"], 4, ALONE)
    known, judged = run_features(trained(toy, Colours()), shards["train"], shards["val"], 4, ALONE)
    assert known.values.shape == (30, 3) and known.targets.tolist() == [number % 3 for number in range(30)]
    assert judged.targets.tolist() == [0, 1, 2, 2, 0] and judged.names == ["0", "1", "2"]
    found = retrieved(known, judged)
    assert found.recall[1] == 100 and found.median_rank == 1 and found.queries == 5
    known.values = torch.full_like(known.values, float("nan"))
    assert retrieved(known, judged).recall[50] == 0


def test_what_has_no_features_is_refused(toy: Any) -> None:
    with pytest.raises(WeightsError, match="has no `features`; its encoder can be measured by evaluate.py --recipe"):
        run_features(trained(toy, Objective()), "anywhere", "anywhere", 4, ALONE)


@pytest.fixture(scope="module")
def run(toy: Any) -> str:
    """An export of a pre-training method, as a run leaves it."""
    path = toy.folder / "pretraining.yaml"
    path.write_text(PRETRAINING.replace("SHARDS", str(toy.folder / "train")))
    method = method_of(load_recipe(str(path)))
    torch.manual_seed(1)
    export_safetensors(method.build().model, method.recipe, str(toy.folder / "exported"))
    return str(toy.folder / "exported")


@pytest.mark.parametrize("method", ["knn", "linear", "few-shot", "retrieval"])
def test_the_command_on_clips(toy: Any, run: str, method: str, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "scores.json"
    words = ["--run", run, "--train", str(toy.folder / "train"), "--val", str(toy.folder / "val")]
    assert main([*words, "--method", method, "--epochs", "3", "--shots", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["videos"] == 11 and result["chance"] == pytest.approx(100 / 3) and result["method"] == method
    value = result["1 a class"]["top1"] if method == "few-shot" else result["R@1" if method == "retrieval" else "top1"]
    assert 0 < value <= 100
    assert 1 < result["effective_rank"] <= 32 and 0 < result["deviation"] < 1
    if method == "retrieval":
        assert result["R@50"] == 100


def test_wrong_usage_and_wrong_places(toy: Any, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--train", "a", "--val", "b", "--shots", "0"]):
        with pytest.raises(SystemExit) as leave:
            main(["--run", run, *words])
        assert leave.value.code == 2, words
    assert main(["--run", str(toy.folder / "nothing"), "--train", "a", "--val", "b"]) == 1
    assert "nothing" in capsys.readouterr().err


def test_pictures_of_a_classifier(shards: dict[str, str], tmp_path: Path) -> None:
    """The other way: an encoder in a recipe of fine-tuning, on pictures."""
    sources = f"data.sources.mnist={{shards: {shards['train']}, val: {shards['val']}}}"
    words = ["--recipe", "demo_pictures", sources, "model.classes=3", "data.workers=0", "evaluate.workers=0",
             f"run.dir={tmp_path / 'run'}"]  # fmt: skip
    assert main([*words, "--method", "knn"]) == 0
    assert json.loads((tmp_path / "run/frozen/knn.json").read_text())["top1"] > 60, "colours are seen by any network"
    assert main([*words, "--method", "linear", "--epochs", "2"]) == 0


def test_commands_of_the_guide(toy: Any, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/finetuning.md has them, in a folder where the demo's run and shards lie."""
    for place, target in (("runs/demo", Path(run)), ("new_performer", "train"), ("new_performer_test", "val")):
        link = tmp_path / (place if place == "runs/demo" else f".cache/demo/shards/{place}")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(toy.folder / target)
    lines = [line for line in (ROOT / "docs/finetuning.md").read_text().splitlines() if "evaluate.py --run" in line]
    monkeypatch.chdir(tmp_path)
    assert len(lines) == 2 and all(main(shlex.split(line)[2:]) == 0 for line in lines)
