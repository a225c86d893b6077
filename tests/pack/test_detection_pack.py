"""Box annotations and videos to shards: the frame at keyframe_s is the annotated one, its boxes beside it."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.commands.pack import main
from pretrain.data.decoders import open_video
from pretrain.data.fetch import SampleReader
from pretrain.data.index import load_index
from pretrain.data.members import parse_sample
from tests.data.boxes.box_files import act, write
from tests.films import BITS, HEIGHT, WIDTH, number_of, write_film

FAST = ["--workers", "0", "--preset", "ultrafast", "--crf", "10", "--gop", "8", "--check-reads", "1"]
HEADER = "video,time,x1,y1,x2,y2,label,person\n"
OWN = HEADER + "club/ü,0.2,0.1,0.2,0.5,1.001,wave,0\nclub/ü,0.2,0.1,0.2,0.5,1.001,a jump,0\nclub/ü,5,0,0,1,1,wave,1\n" \
    "club/ü,5.52,0,0,1,1,wave,1\nclub/ü,9.9,,,,,,\n"  # fmt: skip


def samples(folder: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """By key: the number in the frame that is shown at keyframe_s, and the boxes."""
    index = load_index(str(folder))
    reader = SampleReader([index], None, 60.0)
    found = {}
    for shard, entry in enumerate(index.shards):
        for row in range(entry.samples):
            raw = reader.read(0, shard, row)
            members = parse_sample(raw)
            boxes = members.boxes()
            with open_video(members.video(), "pyav") as video:
                at = int(boxes["keyframe_s"] * video.fps + 0.02)
                found[raw.key] = number_of(video.frames([at])[0]), boxes
    return found


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of films of 10 s at 25 frames a second, and a folder of 40 pictures; each frame has its number."""
    root = tmp_path_factory.mktemp("detection")
    write_film(root / "club/ü.mp4")
    (root / "run/p").mkdir(parents=True)
    for number in range(40):
        pixels = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
        for bit in range(BITS):
            if number >> bit & 1:
                pixels[:, bit * WIDTH // BITS : (bit + 1) * WIDTH // BITS] = 220
        Image.fromarray(pixels).save(root / f"run/p/{number + 1:05d}.png")
    return root


def pack(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert main(["--task", "detection", *map(str, arguments)]) == code
    return capsys.readouterr().err


@pytest.mark.parametrize("place", ["packed", "in place"])
def test_own_videos(place: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, dest = write(tmp_path / "own.csv", OWN), tmp_path / "out"
    how = FAST if place == "packed" else ["--in-place"]
    text = pack(capsys, "--annotations", own, "--data-root", videos, dest, *how)
    assert "4 keyframes of 1 videos, 1 of them without a person; 3 persons" in text
    assert "without a person: 1 that the annotations list and 0 of a detector alone" in text
    assert "2 boxes clipped" in text and "wave 3, a jump 1" in text
    found = samples(dest)
    assert [number for number, _ in found.values()] and len(found) == 4
    by_time = {boxes["time"]: (number, boxes) for number, boxes in found.values()}
    assert {time: number for time, (number, _) in by_time.items()} == {0.2: 5, 5: 125, 5.52: 138, 9.9: 247}
    boxes = by_time[0.2][1]
    assert (boxes["keyframe_s"], boxes["width"], boxes["height"], boxes["unit"]) == (0.2, WIDTH, HEIGHT, "second")
    assert boxes["persons"] == [{"box": [0.1, 0.2, 0.5, 1.0], "labels": [0, 1], "person": 0}]
    assert all(facts["annotated"] is True for _, facts in by_time.values())
    assert by_time[9.9][1]["persons"] == [] and by_time[5][1]["keyframe_s"] == 1.52
    assert json.loads((dest / "classes.json").read_text())["names"] == ["a jump", "wave"]


def test_keyframes_of_one_short_video_are_samples_of_their_own(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Frame folders as JHMDB's: every keyframe's segment is all of the clip."""
    path = write(tmp_path / "gt.pkl", act({"run/p": 40}, (HEIGHT, WIDTH)))
    common = ["--annotations", path, "--split", "train", "--data-root", videos, "--image-fps", "25", "--tolerance", "2"]
    common += ["--seconds", ":6"]
    (tmp_path / "videos.txt").write_text("run/p\n")
    dest = tmp_path / "out"
    text = pack(capsys, *common, "--span", "2", "--drop-empty", "--videos", tmp_path / "videos.txt", dest, *FAST)
    found = samples(dest)
    assert "training sets with --drop-empty" not in text
    assert len(found) == 5 and "rejected" in text and ", 0 rejected" in text
    for number, boxes in found.values():
        assert number == boxes["time"] - 1 and boxes["unit"] == "frame" and boxes["persons"][0]["person"] == 0
    again = pack(capsys, *common, "--span", "2", "--drop-empty", "--videos", tmp_path / "videos.txt", dest, *FAST)
    assert "5 were already done" in again


def test_ava_with_all_its_files(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "p,0900,0,0,1,1,1,0\np,0901,0,0,1,1,1,0\np,0902,0,0,1,1,1,0\n"
    ava = write(tmp_path / "ava.csv", rows)
    frames = "original_vido_id video_id frame_id path labels\n"
    frames += "".join(f'p 0 {number} run/p/{number + 1:05d}.png ""\n' for number in range(40))
    lists, people = write(tmp_path / "train.csv", frames), write(tmp_path / "d.csv", "p,0903,0,0,0.5,1,,0.9\n")
    excluded = write(tmp_path / "e.csv", "p,0901\n")
    labels = write(tmp_path / "l.pbtxt", 'item { name: "bend" id: 1 }\nitem { name: "eat" id: 3 }')
    common = ["--annotations", f"{ava},{lists}", "--labels", labels, "--data-root", videos, "--exclude", excluded,
              "--detections", people, "--image-fps", "10"]  # fmt: skip
    text = pack(capsys, *common, tmp_path / "out", *FAST, code=2)
    assert "ava.csv:1: p at second 900: its last frame is at 3.9" in text and not (tmp_path / "out").exists()
    pack(capsys, *common, "--video-start", "900", tmp_path / "out", *FAST)
    found = {boxes["time"]: (number, boxes) for number, boxes in samples(tmp_path / "out").values()}
    assert {time: number for time, (number, _) in found.items()} == {900: 0, 902: 20, 903: 30}
    assert found[903][1]["detections"] == [{"box": [0, 0, 0.5, 1], "score": 0.9}] and not found[903][1]["persons"]
    assert {time: boxes["annotated"] for time, (_, boxes) in found.items()} == {900: True, 902: True, 903: False}
    assert json.loads((tmp_path / "out/classes.json").read_text())["evaluated"] == [0, 2]


def test_faults_are_skipped_when_asked(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = "club/ü,11,0,0,1,1,wave,1\nnone,1,0,0,1,1,wave,1\nclub/ü,-1,0,0,1,1,wave,1\n"
    own = write(tmp_path / "own.csv", OWN + faults)
    common = ["--annotations", own, "--data-root", videos, tmp_path / "out", "--in-place"]
    text = pack(capsys, *common, code=2)
    assert "own.csv:7: club/ü at second 11" in text and "own.csv:8: none: no such video" in text
    assert "own.csv:9: club/ü at second -1: its first frame is at 0\n" in text
    text = pack(capsys, *common, "--faulty", "skip")
    assert len((tmp_path / "out/refused_rows.txt").read_text().splitlines()) == 3 and "3 rows refused" in text


def test_boxes_are_checked_as_training_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a set with classes; elsewhere boxes.json may be anybody's."""
    video, out = write_film(tmp_path / "a.mp4", 5).read_bytes(), tmp_path / "out"
    out.mkdir()
    right: dict[str, Any] = {"video": "a", "time": 1, "keyframe_s": 0.1, "persons": [{"box": [0, 0, 1, 1]}]}
    boxes = {
        "right": json.dumps(right),
        "far": json.dumps(right | {"detections": [{"box": [0, 0, 3, 1], "score": 1}]}),
        "label": json.dumps(right | {"persons": [{"box": [0, 0, 1, 1], "labels": [2]}]}),
        "late": json.dumps(right | {"keyframe_s": 0.5}),
        "torn": json.dumps(right)[:-9],
        "none": None,
    }
    with tarfile.open(out / "s-000000.tar", "w") as tar:
        for key, text in boxes.items():
            parts = {"boxes.json": text.encode()} if text is not None else {}
            for name, data in ({"mp4": video} | parts).items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    words = ["--check", str(out), "--workers", "0", "--check-decoders", "pyav"]
    assert main(["--index-only", str(out)]) == 0 and main(words) == 1
    torn = capsys.readouterr().err.splitlines()[1]
    assert "sample 'torn': damaged: boxes.json: not JSON" in torn
    (out / "classes.json").write_text('{"names": ["x", "y"], "ids": [1, 2], "evaluated": [0, 1], "groups": null}')
    assert main(words) == 1
    lines = capsys.readouterr().err.splitlines()
    expected = [
        "'far': boxes: boxes.json: keyframe a,1, detections: box [0.0, 0.0, 3.0, 1.0], allowed: x1 < x2",
        "'label': label: boxes.json: keyframe a,1: label 2, allowed: outputs 0 to 1",
        "'late': keyframe: boxes.json: keyframe a,1: 0.5 s into a video of 0.200 s",
        "'torn': boxes: boxes.json is damaged: ",
        "'none': index: no boxes (boxes.json, or `boxes` in its json) among its members ['mp4'",
    ]
    assert len(lines) == 6 and lines[-1] == "pack: 5 problems found", lines
    for line, words_of in zip(lines, expected, strict=False):
        assert line.startswith(f"pack: {out}/s-000000.tar: sample {words_of}"), line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "detection", "{tmp}/o"], "--annotations FILE"),
        (["--task", "detection", "a", "{tmp}/o"], "DEST alone"),
        (["a", "{tmp}/o", "--span", "2"], "--span: only with --task detection"),
        (["--task", "detection", "{tmp}/o", "--annotations", "{tmp}/a.csv"], "--labels"),
        (["--task", "detection", "{tmp}/o", "--annotations", "{tmp}/a.csv", "--classes", "9", "--groups", "a"], "--g"),
    ],
)
def test_wrong_use(
    arguments: list[str], message: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.csv", "a,902,0,0,1,1,1,1\n")
    assert main([one.format(tmp=tmp_path) for one in arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o").exists()
