"""Motion curves beside shards: measured once, taken up again, imported, drawn; and read by workers."""

import functools
import io
import json
import pickle
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from finetune.commands.finetune import main as finetune
from finetune.recipe import load_tune_recipe
from pretrain.commands.motion_index import main
from pretrain.data.decoders import open_video
from pretrain.data.fetch import SampleReader
from pretrain.data.index import ShardIndex, load_index
from pretrain.data.members import Members, parse_sample
from pretrain.data.motion_tables import MotionFacts, load_motion_index, motion_bytes, parse_motion, table_name
from pretrain.data.pack.scan import index_folder
from pretrain.errors import DataError, SampleError
from pretrain.samples import motion_indexing
from pretrain.samples.motion import MotionOptions, distribution
from pretrain.samples.motion_curves import measure_of, motion_curve
from pretrain.samples.motion_indexing import Measuring, MotionTask, measure_video
from pretrain.samples.motion_released import by_key, raw_of, read_released
from tests.toy_shards import ROOT, encoded, write_shard

FRAMES = (12, 1, 20, 9, 12)


def film(frames: int, seed: int) -> bytes:
    """A texture that moves for a moment in the middle."""
    ground = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    return encoded(np.roll(ground, 6 * max(t - frames // 2, 0) * (t < frames // 2 + 3), axis=1) for t in range(frames))


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards: videos of several lengths, one of one frame, and one that is no video."""
    folder = tmp_path_factory.mktemp("motion") / "shards"
    folder.mkdir()
    films = [film(frames, seed) for seed, frames in enumerate(FRAMES)]
    facts = [{"frames": frames} for frames in FRAMES]
    named = [(f"class/v_{number}", fact, data) for number, (fact, data) in enumerate(zip(facts, films, strict=True))]
    write_shard(folder / "s-000000.tar", named[:3])
    write_shard(folder / "s-000001.tar", [*named[3:], ("class/broken", {}, b"no video")])
    index_folder(str(folder))
    return folder


@pytest.fixture
def shards(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "shards"))


def curves(folder: Path) -> dict[str, np.ndarray | None]:
    """Curves as a worker is given them."""
    opened = load_index(str(folder))
    reader = SampleReader([opened], None, 5.0, motion={0})
    found = {}
    for number, shard in enumerate(opened.shards):
        for row in range(shard.samples):
            raw = reader.read(0, number, row)
            found[raw.key] = parse_sample(raw).motion
    return found


def measured(folder: Path, kind: Any = "ssim", side: int | None = None) -> dict[str, np.ndarray]:
    """Curves as they are measured on the spot."""
    opened, found = load_index(str(folder)), {}
    reader = SampleReader([opened], None, 5.0)
    for number, shard in enumerate(opened.shards):
        for row in range(shard.samples):
            members = parse_sample(reader.read(0, number, row))
            if "broken" not in members.key:
                with open_video(members.footage(), "pyav") as video:
                    frames = video.frames(range(video.num_frames))
                found[members.key] = motion_curve(frames, measure_of(kind), side)
    return found


def run(*words: object, code: int = 0) -> None:
    assert main([*map(str, words), *(() if "--plot" in words else ("--workers", "0"))]) == code


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)


def test_every_video_is_measured_once(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    fingerprint = load_index(str(shards)).fingerprint
    run(shards)
    told = capsys.readouterr().err
    assert "5 videos measured" in told
    assert "(ssim) of 5 of 6 videos; 1 have none: their frames are chosen uniformly" in told
    assert "s-000001.tar/class/broken: open: " in told
    found = curves(shards)
    assert found.pop("class/broken") is None and same(found, measured(shards))
    assert [len(found[f"class/v_{n}"]) for n in range(5)] == [frames - 1 for frames in FRAMES]  # type: ignore[arg-type]
    assert all((shards / name).read_bytes() == content for name, content in before.items()), "nothing is changed"
    opened = load_index(str(shards))
    made = load_motion_index(opened)
    assert made is not None and opened.fingerprint == fingerprint and len(made.entries) == 2
    assert list(made.entries[1].missing) == ["class/broken"]


def test_the_work_travels_to_processes(shards: Path) -> None:
    """As the pool sends it; crashes are the pool's own test."""
    how = Measuring(MotionFacts("ssim"), measure_of("ssim"))
    call, task = pickle.loads(pickle.dumps((functools.partial(measure_video, how), MotionTask(str(shards), 0, 2))))
    found = call(task)
    assert np.array_equal(found.curve, measured(shards)["class/v_2"]) and found.bytes > 1000
    assert pickle.loads(pickle.dumps(found)).reason == ""


def test_finished_shards_are_not_measured_again(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(shards)
    first = (shards / "motion.json").read_bytes()
    (shards / "motion.json").unlink()
    cut = shards / table_name("s-000001.tar")
    cut.write_bytes(cut.read_bytes()[:-40])
    looked_at: list[MotionTask] = []

    def noted(how: Measuring, task: MotionTask) -> Any:
        looked_at.append(task)
        return measure_video(how, task)

    monkeypatch.setattr(motion_indexing, "measure_video", noted)
    run(shards)
    assert {task.shard for task in looked_at} == {1} and (shards / "motion.json").read_bytes() == first
    run(shards)
    assert len(looked_at) == 3


def test_a_set_of_pictures_is_refused_and_one_of_both_is_not(tmp_path: Path, shards: Path, capsys: Any) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (32, 24)).save(picture, "JPEG")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with tarfile.open(pictures / "a-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("1.jpg", "2.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(picture.getvalue())
            tar.addfile(info, io.BytesIO(picture.getvalue()))
    index_folder(str(pictures))
    run(pictures, code=2)
    told = capsys.readouterr().err
    assert f"{pictures}: a data set of pictures, in which nothing moves; allowed: one of videos" in told
    assert not (pictures / "motion.json").exists()
    shutil.copy(pictures / "a-000000.tar", shards / "a-000000.tar")
    index_folder(str(shards))
    run(shards)
    assert "(ssim) of 7 of 8 videos" in capsys.readouterr().err


def test_parts_share_the_shards(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(shards, "--part", "1/2")
    assert "other parts are not done yet" in capsys.readouterr().err and not (shards / "motion.json").exists()
    assert not (shards / table_name("s-000000.tar")).exists()
    run(shards, "--part", "0/2")
    assert load_motion_index(load_index(str(shards))) is not None


def test_curves_of_two_measures_do_not_mix(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(shards)
    run(shards, "--kind", "abs", "--short-side", "24", code=2)
    assert "--again replaces them" in capsys.readouterr().err
    run(shards, "--kind", "abs", "--short-side", "24", "--again")
    found = curves(shards)
    found.pop("class/broken")
    assert same(found, measured(shards, "abs", 24))


def test_features(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(shards, "--kind", "feature", code=1)
    assert "--weights FILE, a checkpoint of PAN" in capsys.readouterr().err
    weights = {"shallow_conv.weight": torch.randn(8, 3, 7, 7), "shallow_conv.bias": torch.randn(8)}
    save_file(weights, tmp_path / "pan.safetensors")
    run(shards, "--kind", "feature", "--weights", tmp_path / "pan.safetensors")
    found = load_motion_index(load_index(str(shards)))
    assert found is not None and found.facts.kind == "feature" and len(found.facts.weights) == 16
    run(shards, "--weights", tmp_path / "pan.safetensors", code=2)
    assert "only --kind feature has weights" in capsys.readouterr().err


def test_changed_shards_are_noticed_and_measured_again(shards: Path) -> None:
    run(shards)
    write_shard(shards / "s-000001.tar", [("other", {}, film(15, 9))])
    index_folder(str(shards))
    with pytest.raises(DataError, match="its curves are of other shards.*run launch/motion_index.py"):
        curves(shards)
    run(shards)
    found = curves(shards)
    assert len(found) == 4 and found["other"] is not None and len(found["other"]) == 14


@pytest.mark.parametrize("damage", ["table", "index"])
def test_damage_is_told(shards: Path, damage: str) -> None:
    run(shards)
    path = shards / (table_name("s-000000.tar") if damage == "table" else "motion.json")
    path.write_bytes(path.read_bytes().replace(b"s-000", b"t-000") if damage == "index" else b"PK" + path.read_bytes())
    with pytest.raises(DataError, match="motion.*(damaged|not the curves).*launch/motion_index.py"):
        curves(shards)


def test_without_curves_samples_have_none(shards: Path) -> None:
    assert set(curves(shards).values()) == {None}


def test_a_member_holds_the_curve_of_its_sample() -> None:
    file = io.BytesIO()
    np.save(file, np.arange(5.0))
    beside = np.ones(5, np.float32)
    members = Members({"mp4": b"", "motion.npy": file.getvalue()}, motion=beside)
    assert members.motion is not None and members.motion.tolist() == [0, 1, 2, 3, 4]
    assert Members({"mp4": b""}, motion=beside).motion is beside and Members({"mp4": b""}).motion is None
    with pytest.raises(SampleError, match="motion: its motion.npy holds no row of numbers"):
        _ = Members({"motion.npy": b"nothing"}).motion


def test_a_table_comes_back(shards: Path) -> None:
    run(shards)
    data = (shards / table_name("s-000001.tar")).read_bytes()
    table = parse_motion(data, "x")
    assert motion_bytes(table) == data and table.facts.kind == "ssim" and len(table.reasons[2]) > 5


def released(folder: Path, cumulative: bool) -> dict[str, list[float] | None]:
    """What the released scripts write of these videos."""
    found: dict[str, list[float] | None] = {}
    for number, (key, curve) in enumerate(measured(folder).items()):
        shares = distribution(curve) if len(curve) else None
        values = shares if cumulative and shares is not None else curve
        found[f"some/where/{key.split('/')[1]}.webm"] = None if number == 1 else np.asarray(values).tolist()
    return found


@pytest.mark.parametrize("cumulative", [False, True])
def test_released_files(shards: Path, tmp_path: Path, cumulative: bool) -> None:
    content = released(shards, cumulative)
    content["some/where/v_3.webm"] = [0.2, 1.0] if cumulative else [0.2, 0.1, 0.3]  # of a video of other frames
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    run(shards, "--import", path)
    found, own = curves(shards), measured(shards)
    opened = load_motion_index(load_index(str(shards)))
    assert opened is not None and opened.facts.kind == ("feature" if cumulative else "ssim")
    for key in ("class/v_0", "class/v_2", "class/v_4"):
        assert found[key] is not None
        np.testing.assert_allclose(distribution(found[key]), distribution(own[key]), atol=1e-6)
    missing = {key for key, curve in found.items() if curve is None}
    # Without the convolution's weights nothing can be measured; the other file's measure needs none.
    assert missing == ({"class/v_1", "class/v_3", "class/broken"} if cumulative else {"class/broken"})
    if cumulative:
        assert "a curve of 3 frames for its 9 frames" in opened.entries[1].missing["class/v_3"]


def test_cumulative_curves_are_not_summed_twice() -> None:
    """The released loader does it, and frames move towards the end (section 8)."""
    curve = np.random.default_rng(0).random(30) + 0.01
    shares = distribution(curve)
    assert shares is not None
    np.testing.assert_allclose(distribution(raw_of(shares)), shares, atol=1e-12)
    assert (raw_of(np.array([0.5, 0.5 - 1e-9, 1.0])) >= 0).all()


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('{"a": [1]}{"b": [1]}', "not JSON .* a second run of the released script appends"),
        ("[1]", "found list, allowed: an object"),
        ('{"a": [[1], [2, 3]]}', r"a: found \[\[1\], \[2, 3\]\], allowed: a list of numbers"),
        ('{"a": "b"}', "a: found b, allowed: a list of numbers"),
    ],
)
def test_files_that_were_not_released(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(DataError, match=wrong):
        read_released([str(path)])


def test_files_of_both_kinds_are_refused(tmp_path: Path) -> None:
    for name, values in (("raw", [0.1, 0.4, 0.2]), ("sums", [0.2, 0.5, 1.0])):
        (tmp_path / name).write_text(json.dumps({"v": values}))
    with pytest.raises(DataError, match="both kinds of curves"):
        read_released([str(tmp_path / "raw"), str(tmp_path / "sums")])


def test_names_must_tell_samples_apart(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"x/v 1.mp4": [0.1, 0.2]}))
    found = read_released([str(tmp_path / "a.json")])
    assert list(by_key(found, ["train/v_1", "train/v_2"])) == ["train/v_1"], "as pack.py makes keys of names"
    with pytest.raises(DataError, match="x/v 1.mp4: fits a/v_1, b/v_1"):
        by_key(found, ["a/v_1", "b/v_1"])
    with pytest.raises(DataError, match=r"not one of the 1 names \(x/v 1.mp4\) is that of a sample here \(w\)"):
        by_key(found, ["w"])


def test_the_picture_says_which_frames_and_why(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(shards, "--plot", "class/v_2", "--frames", "8")
    before = capsys.readouterr().out
    run(shards)
    capsys.readouterr()
    run(shards, "--plot", "class/v_2", "--frames", "8", "--out", "b.png")
    assert capsys.readouterr().out.splitlines()[0] == before.splitlines()[0], "measured, or read from the table"
    assert "class/v_2: frames " in before and before.endswith("picture: v_2_motion.png\n")
    for name in ("v_2_motion.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width == 1000 and len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
    run(shards, "--plot", "nobody", code=1)
    assert "no sample 'nobody'; keys look like 'class/v_0'" in capsys.readouterr().err
    run(shards, "--plot", "class/v_1", code=2)
    assert "nothing moves in it" in capsys.readouterr().err
    run(shards, "--plot", "class/v_2", "--mu", "2", code=2)
    assert "--mu: found 2, allowed: from 0" in capsys.readouterr().err


def test_commands_of_the_guide(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/systems/mgsampler.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    for split in ("train", "val"):
        shutil.copytree(shards, tmp_path / "shards" / split)
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        program, script, *words = shlex.split(line)
        assert program == "python" and (ROOT / script).is_file()
        assert (run(*words) if script == "launch/motion_index.py" else finetune(words)) in (None, 0)
    assert (tmp_path / "motion.png").is_file()
    (section,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "own.yaml").write_text("base: vit_b_ssv2\n" + section)
    recipe = load_tune_recipe(str(tmp_path / "own.yaml"))
    assert recipe.input.motion == MotionOptions() and recipe.data.sources["ssv2"].needs_motion


def test_a_memory_store_is_indexed_like_a_folder(shards: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(str(shards), "/motion_test", recursive=True)
    url = next(u for u in ("memory://motion_test", "memory://motion_test/shards") if store.exists(f"{u}/index.json"))
    run(url)
    opened: ShardIndex = load_index(url)
    assert load_motion_index(opened) is not None
    made: Callable[[int, int, int], Any] = SampleReader([opened], None, 5.0, motion={0}).read
    assert made(0, 0, 0).motion is not None
