"""From a fine-tuning run to weights for use elsewhere, and back: launch/export.py and launch/predict.py."""

import functools
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from finetune.adapters.adapter_files import load_adapter
from finetune.classification.fine_tuned import FineTuned, load_fine_tuned
from finetune.classification.graphs import FACTS, OPSET
from finetune.classification.predictions import read_predictions
from finetune.classification.predictor import predict_video, predictor_of, predictor_of_graph
from finetune.classification.views import EvaluationViews
from finetune.commands import export, predict
from finetune.recipe import load_tune_recipe
from pretrain.checkpoint.consolidate import consolidated_state
from pretrain.models.classifier import VideoClassifier
from pretrain.models.classifier_weights import load_pretrained
from pretrain.objectives.base import method_of
from pretrain.runtime.vision_ops import ensure_torchvision
from tests.toy_run import train

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ["down", "left", "right"]


@pytest.fixture(scope="module")
def run(toy: Any) -> Path:
    """One epoch with averaged weights, tested with 2 clips x 3 crops."""
    toy.run("out", "ema.decay=0.9", "schedule.epochs=1", "checkpoint.every_steps=1", "checkpoint.keep_last=9")
    return Path(toy.folder / "out")


@pytest.fixture(scope="module")
def lora(toy: Any, run: Path) -> Path:
    """Low-rank updates on top of its export, whose weights are the averages."""
    weights = toy.folder / "out_weights"
    assert export.main([str(run), str(weights)]) == 0
    words = [f"run.init_weights={weights}", "tune.method=lora", "schedule.max_steps=2", "evaluate.every_epochs=9"]
    toy.run("out_lora", *words)
    return Path(toy.folder / "out_lora")


@pytest.fixture(scope="module")
def clip(toy: Any) -> Path:
    """A validation video as a file of its own."""
    with tarfile.open(toy.folder / "val" / "s-000000.tar") as shard:
        content = shard.extractfile("0001.mp4")
        assert content is not None
        path = Path(toy.folder / "clip.mp4")
        path.write_bytes(content.read())
    return path


@pytest.fixture(scope="module")
def graphs(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the run's graph once, as a file of that name, which nothing else lies beside."""
    layouts = {"out.onnx": "onnx", "out.pt2": "torch_export"}

    @functools.cache
    def write(name: str) -> Path:
        path = tmp_path_factory.mktemp("graph") / name
        assert export.main([str(run), str(path), "--format", layouts[name]]) == 0
        return path

    return write


def videos(count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (count, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)


def logits(tuned: FineTuned, count: int = 2) -> torch.Tensor:
    result: torch.Tensor = tuned.objective.predict(videos(count))
    return result


def plain(tuned: FineTuned, path: Path) -> FineTuned:
    """An untrained model of the same sizes with the weights of a file."""
    model = VideoClassifier(tuned.recipe.model, 4, 32, 32).eval()
    report = load_pretrained(model, str(path))
    assert not report.missing and not report.unexpected
    tuned.objective.model = model
    return tuned


def test_averages_are_what_counts(run: Path) -> None:
    tuned, state = load_fine_tuned(run), consolidated_state(run / "checkpoints" / "step_00000003")
    weight = dict(tuned.model.named_parameters())["head.weight"]
    assert torch.equal(weight, state["average.head|weight"]) and not torch.equal(weight, state["model.head.weight"])
    assert tuned.names == CLASSES


def test_safetensors_and_card(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    assert "step_00000003" in capsys.readouterr().out
    again = load_fine_tuned(tmp_path / "out")
    assert torch.equal(logits(again), logits(load_fine_tuned(run)))
    assert (tmp_path / "out" / "classes.txt").read_text().split() == CLASSES == again.names
    card = (tmp_path / "out" / "README.md").read_text()
    scores = json.loads((run / "predictions" / "step_00000003" / "scores.json").read_text())
    assert f"| test/top1 | {scores['top1']:.4g} | 3 |" in card and "| eval/top1 |" in card and "smoothing: 0.1" in card
    assert card.startswith("---\nlibrary_name: tubelet\npipeline_tag: video-classification\n")
    assert "\ntags: [classification, classifier, augmented_clip]\n---\n" in card


def test_card_of_an_older_checkpoint_has_its_metrics(run: Path, toy: Any, tmp_path: Path) -> None:
    assert export.main([str(run / "checkpoints" / "step_00000002"), str(tmp_path)]) == 0
    loss = {record["step"]: record["train/loss"] for record in toy.records("out") if "train/loss" in record}
    card = (tmp_path / "README.md").read_text()
    assert f"| train/loss | {loss[2]:.4g} | 2 |" in card and "test/" not in card


def test_huggingface(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5")
    ensure_torchvision()
    from transformers import VideoMAEForVideoClassification

    assert export.main([str(run), str(tmp_path), "--format", "huggingface"]) == 0
    tuned = load_fine_tuned(run)
    other = VideoMAEForVideoClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        pixels = tuned.objective.normalization(videos().float() / 255).permute(0, 1, 4, 2, 3)
        assert_close(other(pixels).logits, logits(tuned), rtol=1e-4, atol=1e-4)
    assert [other.config.id2label[number] for number in range(3)] == CLASSES
    assert torch.equal(logits(load_fine_tuned(tmp_path)), logits(tuned)), "predict.py opens it too"
    assert "library_name: transformers" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("height", "width", "most"), [(32, 48, 1e-6), (48, 32, 1e-6), (48, 64, 0.08)])
def test_huggingface_processors_make_our_input(run: Path, tmp_path: Path, height: int, width: int, most: float) -> None:
    """Of a smooth moving clip, in the middle; equal where nothing is resized, else antialiasing differs a little."""
    pytest.importorskip("transformers", minversion="5")
    ensure_torchvision()
    from transformers import AutoImageProcessor, AutoVideoProcessor

    assert export.main([str(run), str(tmp_path), "--format", "huggingface"]) == 0
    tuned = load_fine_tuned(run)
    y, x = np.mgrid[:height, :width]
    clip = np.stack([[128 + 90 * np.sin((x + 3 * t + c) / 9) * np.cos(y / 7) for c in range(3)] for t in range(4)])
    frames = clip.transpose(0, 2, 3, 1).round().astype(np.uint8)
    view = EvaluationViews((4, 32, 32), "pyav")._centre(frames, 32)
    ours = tuned.objective.normalization(torch.from_numpy(view)[None].float() / 255).permute(0, 1, 4, 2, 3)
    images = AutoImageProcessor.from_pretrained(tmp_path)(list(frames), return_tensors="pt")["pixel_values"]
    videos = AutoVideoProcessor.from_pretrained(tmp_path)(frames, return_tensors="pt")["pixel_values"]
    for found in (images, videos):
        assert found.shape == (1, 4, 3, 32, 32)
        assert float((found - ours).abs().max()) <= most


def test_official(run: Path, tmp_path: Path) -> None:
    assert export.main([str(run), str(tmp_path / "out.pth"), "--format", "official"]) == 0
    tuned = load_fine_tuned(run)
    expected = logits(tuned)
    assert torch.equal(logits(plain(tuned, tmp_path / "out.pth")), expected)


def test_onnx(run: Path, graphs: Callable[[str], Path]) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    path = graphs("out.onnx")
    assert [file.name for file in path.parent.iterdir()] == ["out.onnx"]
    content = onnx.load(path)
    assert [one.version for one in content.opset_import if not one.domain] == [OPSET]
    assert json.loads({one.key: one.value for one in content.metadata_props}["classes"]) == CLASSES
    session, tuned = onnxruntime.InferenceSession(path), load_fine_tuned(run)
    for count in (1, 5):
        (found,) = session.run(["logits"], {"video": videos(count).numpy()})
        assert_close(torch.from_numpy(found), logits(tuned, count), rtol=1e-4, atol=1e-5)


def test_onnx_names_its_extra(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export.main([str(run), str(tmp_path / "out.onnx"), "--format", "onnx"]) == 1
    assert "pip install 'tubelet[onnx]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_torch_export(run: Path, graphs: Callable[[str], Path]) -> None:
    path = graphs("out.pt2")
    facts = {FACTS: ""}
    module, tuned = torch.export.load(str(path), extra_files=facts).module(), load_fine_tuned(run)
    for count in (1, 5):
        assert_close(module(videos(count)), logits(tuned, count), rtol=1e-5, atol=1e-6)
    assert json.loads(facts[FACTS])["classes"] == CLASSES and json.loads(facts[FACTS])["stride"] == 2


def test_files_have_their_suffix(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(run), str(tmp_path / "out"), "--format", "onnx"]) == 2
    assert "give one ending in .onnx" in capsys.readouterr().err


def test_merged_updates(lora: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dest = str(tmp_path / "out.pth")
    assert export.main([str(lora), dest, "--format", "official"]) == 2
    assert "add --merge" in capsys.readouterr().err
    assert export.main([str(lora), dest, "--format", "official", "--merge"]) == 0
    assert export.main([str(lora), str(tmp_path / "out"), "--merge"]) == 0
    tuned = load_fine_tuned(lora)
    expected = logits(tuned)
    folder = load_fine_tuned(tmp_path / "out")
    assert folder.recipe.tune.method == "full"
    assert_close(logits(folder), expected, rtol=1e-5, atol=1e-6)
    assert_close(logits(plain(tuned, tmp_path / "out.pth")), expected, rtol=1e-5, atol=1e-6)
    assert export.main([str(run), str(tmp_path / "again"), "--merge"]) == 2, "nothing to merge"


def test_unmerged_updates_open_too(lora: Path, tmp_path: Path) -> None:
    assert export.main([str(lora), str(tmp_path)]) == 0
    assert torch.equal(logits(load_fine_tuned(tmp_path)), logits(load_fine_tuned(lora)))


def test_adapter_fits_its_backbone(lora: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.safetensors"
    assert export.main([str(lora), str(path), "--format", "adapter"]) == 0
    assert path.stat().st_size < (run.parent / "out_weights" / "model.safetensors").stat().st_size / 8
    backbone = load_fine_tuned(run)
    assert not torch.equal(logits(backbone), logits(load_fine_tuned(lora)))
    assert load_adapter(backbone.model, str(path)).method == "lora"
    assert_close(logits(backbone), logits(load_fine_tuned(lora)), rtol=1e-5, atol=1e-6)
    assert export.main([str(run), str(tmp_path / "full.safetensors"), "--format", "adapter"]) == 2
    assert "there is no adapter" in capsys.readouterr().err


def test_predict_as_a_user(run: Path, clip: Path, tmp_path: Path) -> None:
    printed = train([ROOT / "launch" / "predict.py", clip, "--weights", run], 1, tmp_path)
    rows = [line.split() for line in printed.splitlines() if " % " in line]
    shares = [float(row[0]) for row in rows]
    assert sorted(row[2] for row in rows) == CLASSES and shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert "picture: clip_prediction.png" in printed
    picture = np.asarray(Image.open(tmp_path / "clip_prediction.png"))
    assert picture.shape[1] == 4 * 34 + 2 and picture.shape[0] == 32 + 14, "one row of 4 frames"


def test_prediction_is_that_of_the_test(run: Path, clip: Path, tmp_path: Path) -> None:
    """The same views of the same video, whether it comes from shards or from a file; and so from an export."""
    stored = read_predictions(run / "predictions" / "step_00000003")
    expected = stored.merged[stored.keys.index("toy/s-000000/0001")]
    assert export.main([str(run), str(tmp_path)]) == 0
    for weights in (run, tmp_path):
        found = predict_video(predictor_of(load_fine_tuned(weights)), str(clip), clips=2, crops=3)
        assert found.views.shape == (6, 4, 32, 32, 3)
        assert np.allclose(found.values, expected, atol=1e-5)


def test_predict_takes_names_and_draws_every_view(run: Path, clip: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "names.txt").write_text("falls\nwest\neast\n")
    out = tmp_path / "below" / "seen.png"
    words = ["--labels", str(tmp_path / "names.txt"), "--top", "2", "--clips", "2", "--out", str(out)]
    assert predict.main([str(clip), "--weights", str(run), *words]) == 0
    printed = capsys.readouterr().out
    assert sum(name in printed for name in ("falls", "west", "east")) == 2 and "down" not in printed
    assert Image.open(out).size[1] == 2 * (32 + 14)


@pytest.mark.parametrize("name", ["out.onnx", "out.pt2"])
def test_predict_from_a_graph_file(run: Path, clip: Path, graphs: Callable[[str], Path], name: str) -> None:
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime")
    expected = predict_video(predictor_of(load_fine_tuned(run)), str(clip), clips=2, crops=3)
    judge = predictor_of_graph(graphs(name))
    found = predict_video(judge, str(clip), clips=2, crops=3, decoder="pyav")
    assert judge.names == CLASSES and np.array_equal(found.views, expected.views)
    assert np.allclose(found.values, expected.values, atol=1e-5)
    assert predict.main([str(clip), "--weights", str(graphs(name)), "--decoder", "pyav", "--keep-rate", "0.5"]) == 2


def test_predict_with_fewer_tokens(run: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(clip), "--weights", str(run), "--out", str(tmp_path / "seen.png")]
    printed = []
    for rate in ("1", "0.3", "0"):
        code = predict.main([*words, "--keep-rate", rate])
        printed.append(capsys.readouterr())
        assert code == (2 if rate == "0" else 0)
    assert predict.main(words) == 0
    plain = capsys.readouterr().out
    assert printed[0].out == plain != printed[1].out and "keep_rate=0.0" in printed[2].err


def test_an_image_is_opened_as_training_does(toy: Any, tmp_path: Path) -> None:
    """Transparent pixels are white; video decoders show the colours below them."""
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 4), dtype=np.uint8)
    pixels[:, 20:40, 3], pixels[:, :20, 3], pixels[:, 40:, 3] = 0, 255, 255
    opaque = np.where(pixels[..., 3:] > 0, pixels[..., :3], np.uint8(255))
    Image.fromarray(pixels).save(tmp_path / "transparent.PNG")
    Image.fromarray(opaque).save(tmp_path / "opaque.png")
    method = method_of(load_tune_recipe(str(toy.recipe)))
    judge = predictor_of(FineTuned(method.recipe, method.build().eval(), CLASSES, tmp_path))
    found, expected = (predict_video(judge, str(tmp_path / name)) for name in ("transparent.PNG", "opaque.png"))
    assert found.views.shape == (1, 4, 32, 32, 3) and np.array_equal(found.views, expected.views)
    assert (found.views == found.views[:, :1]).all(), "one frame, repeated"


@pytest.mark.parametrize(
    ("video", "words", "text"),
    [
        ("nowhere.mp4", [], "nowhere.mp4: no such file"),
        (".", [], ".: a folder"),
        ("text.mp4", [], "can't be read as a video"),
        ("text.jpg", [], "can't be read as a video or an image"),
        ("clip", ["--labels", "two.txt"], "2 names, but the model has 3 classes"),
        ("clip", ["--weights", "."], "neither a run"),
        ("clip", ["--weights", "text.onnx"], "text.onnx: can't be opened"),
        ("clip", ["--weights", "text.pt2"], "text.pt2: can't be opened"),
        ("clip", ["--decoder", "eyes"], "allowed are decord"),
        ("clip", ["--out", "text.mp4/x.png"], "the picture can't be written"),
    ],
)
def test_errors_are_one_line(
    run: Path, clip: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, video: str, words: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.mp4").write_text("no video")
    Path("text.jpg").write_text("no picture")
    Path("two.txt").write_text("one\ntwo\n")
    Path("text.onnx").write_text("no graph")
    Path("text.pt2").write_text("no graph")
    code = predict.main([str(clip) if video == "clip" else video, "--weights", str(run), *words])
    assert code == (2 if "eyes" in words else 1), "no such decoder is wrong usage, files that can't be used are not"
    error = capsys.readouterr().err
    assert error.startswith("predict: ") and text in error and "Traceback" not in error


def test_pretrained_weights_have_no_classes(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("program: pretrain\nmodel: {name: videomae}\nobjective: {name: videomae}\n")
    assert predict.main([str(clip), "--weights", str(tmp_path)]) == 1
    assert "which have no classifier; fine-tune them" in capsys.readouterr().err
