"""`sampling: motion` from the table beside a shard to the frames of training, validation, test and prediction."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.classification.fine_tuned import FineTuned
from finetune.classification.predictor import predict_video, predictor_of
from finetune.classification.recipe_checks import classification_warnings
from finetune.classification.validation import centre_view, video_sets
from finetune.classification.validation import test_views as views_of_the_test
from finetune.classification.views import held_out_videos
from finetune.recipe import TuneRecipe, load_tune_recipe
from pretrain.commands.motion_index import main
from pretrain.data.decoders import open_video
from pretrain.data.fetch import SampleReader
from pretrain.data.index import load_index
from pretrain.data.members import Members, parse_sample
from pretrain.data.pack.scan import index_folder
from pretrain.data.randomness import generator
from pretrain.data.stream import TrainStream
from pretrain.data.stream_plan import open_plan, open_sources
from pretrain.engine.assemble import fingerprints
from pretrain.errors import DataError
from pretrain.objectives.base import method_of
from pretrain.plan.dry_run import dry_run
from pretrain.samples.frame_choice import VideoFacts
from pretrain.samples.transforms import centre_crop
from tests.toy_shards import encoded, write_shard

CLASSES = ("down", "left", "right")
WORDS = ("data.sources.toy.sampling=motion", "input.crop=center", "input.views=1")


def brief(seed: int) -> bytes:
    """A square that stands still but for some frames near the end."""
    rng = np.random.default_rng(seed)
    pictures = []
    for t in range(24):
        picture = np.full((48, 64, 3), 30, np.uint8)
        x = 10 + 6 * int(np.clip(t - 15 - seed % 3, 0, 5))
        picture[16:32, x : x + 16] = rng.integers(200, 202, 3)
        pictures.append(picture)
    return encoded(pictures)


@pytest.fixture(scope="module")
def unmeasured(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("brief")
    for split, count in (("train", 8), ("val", 3)):
        (folder / split).mkdir()
        samples = [(f"{n}", {"label": CLASSES[n % 3]}, brief(n)) for n in range(count)]
        write_shard(folder / split / "s-000000.tar", samples)
        index_folder(str(folder / split))
    return folder


@pytest.fixture(scope="module")
def folder(unmeasured: Path) -> Path:
    copy = Path(shutil.copytree(unmeasured, unmeasured.parent / "measured"))
    assert main([str(copy / "train"), str(copy / "val"), "--workers", "0"]) == 0
    return copy


def load(toy: Any, folder: Path, *words: str) -> TuneRecipe:
    places = [f"data.sources.toy.{name}={folder}/{split}" for name, split in (("shards", "train"), ("val", "val"))]
    return load_tune_recipe(str(toy.recipe), [*places, *WORDS, *words])


def members_of(folder: Path, row: int) -> Members:
    return parse_sample(SampleReader([load_index(str(folder))], None, 5.0, motion={0}).read(0, 0, row))


def test_a_data_set_without_curves_ends_the_start(toy: Any, unmeasured: Path) -> None:
    with pytest.raises(DataError, match="data.sources.toy.sampling=motion: .*train has no motion curves; measure them"):
        method_of(load(toy, unmeasured)).samples()
    with pytest.raises(DataError, match="val has no motion curves"):
        video_sets(load(toy, unmeasured), test=False)


def test_a_dry_run_tells_what_the_start_would(toy: Any, unmeasured: Path, folder: Path) -> None:
    def told(recipe: TuneRecipe) -> str:
        (data,) = [section for section in dry_run(method_of(recipe)) if section.title == "data"]
        return "\n".join(" ".join(row) for row in data.rows)

    refused = told(load(toy, unmeasured))
    assert "REFUSED training would not start" in refused and "train has no motion curves; measure them" in refused
    assert "val has no motion curves" in told(load(toy, folder, f"data.sources.toy.val={unmeasured / 'val'}"))
    sound = told(load(toy, folder))
    assert "REFUSED" not in sound and "looked at data.sources.toy: motion curves (ssim) of 8 of 8 videos" in sound
    assert "8 labels in 3 classes" in sound
    few = told(load(toy, folder, "model.classes=2"))
    assert "3 class names, but model.classes=2" in few and "looked at" not in few


def test_curves_of_another_measure_end_the_start(toy: Any, folder: Path) -> None:
    with pytest.raises(DataError, match="are of kind ssim, input.motion.kind says abs"):
        method_of(load(toy, folder, "input.motion.kind=abs")).samples()


def test_the_stream_shows_frames_of_the_motion(toy: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = load(toy, folder)
    with caplog.at_level(logging.INFO):
        samples = method_of(recipe).samples()
    assert "motion curves (ssim) of 8 of 8 videos" in caplog.text
    batch = next(TrainStream(open_plan(recipe.data, recipe.batch, recipe.run.seed), samples, 0, 1, workers=0))
    rule = recipe.input.frame_choice("motion", None)
    for number, key in enumerate(batch["key"]):
        members = members_of(folder / "train", int(key))
        rng = generator(recipe.run.seed, int(batch["epoch"][number]), int(batch["position"][number]), 0, "clip")
        chosen = rule.training(VideoFacts(24, members.motion), rng)
        assert chosen.min() >= 10 and np.median(chosen) >= 14, "where it moves"
        with open_video(members.footage(), "pyav") as reader:
            assert (batch["video"][number].numpy() == centre_crop(reader.frames(chosen), 32, 32)).all()


def test_evaluation_and_prediction_see_the_same_frames(toy: Any, folder: Path, tmp_path: Path) -> None:
    recipe = load(toy, folder)
    sets, rule = video_sets(recipe, test=False), recipe.input.frame_choice("motion", None)
    one, clips = (next(iter(held_out_videos(sets, views(recipe), 0, 1, 5))).batch
                  for views in (centre_view, views_of_the_test))  # fmt: skip
    members = members_of(folder / "val", 0)
    with open_video(members.footage(), "pyav") as reader:
        facts = VideoFacts(reader.num_frames, members.motion)
        assert (one["views"][0].numpy() == centre_view(recipe)._centre(reader.frames(rule.validation(facts)), 32)).all()
        for views, chosen in zip(clips["views"].numpy().reshape(2, 3, 4, 32, 32, 3), rule.clips(facts, 2, generator(0)),
                                 strict=True):  # fmt: skip
            # The crop in the middle of three.
            assert np.abs(views[1].astype(int) - centre_crop(reader.frames(chosen), 32, 32)).mean() < 3
    # A file that no table lists is measured on the spot.
    path = tmp_path / "clip.mp4"
    path.write_bytes(bytes(members.video()))  # type: ignore[arg-type]
    method = method_of(recipe)
    judge = predictor_of(FineTuned(method.recipe, method.build().eval(), list(CLASSES), tmp_path))
    assert (predict_video(judge, str(path)).views == one["views"].numpy()).all()


def test_other_curves_are_other_data(toy: Any, folder: Path, tmp_path: Path) -> None:
    """A run that goes on would see other frames of the same videos."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    before = fingerprints(open_sources(load(toy, copy).data))
    assert before == fingerprints(open_sources(load(toy, folder).data)) and ", motion " in before["toy"]
    assert main([str(copy / "train"), "--short-side", "24", "--again", "--workers", "0"]) == 0
    assert fingerprints(open_sources(load(toy, copy).data)) != before
    dense = load(toy, copy, "data.sources.toy.sampling=dense")
    assert fingerprints(open_sources(dense.data)) == {"toy": load_index(str(copy / "train")).fingerprint}


def test_options_without_effect(toy: Any, folder: Path) -> None:
    told = "\n".join(classification_warnings(load(toy, folder, "data.sources.toy.stride=2")))
    assert "data.sources.toy.stride has no effect: sampling by motion" in told and "input.motion" not in told
    words = ("data.sources.toy.sampling=sparse", "input.motion.mu=0.2")
    assert "input.motion has no effect" in "\n".join(classification_warnings(load(toy, folder, *words)))
