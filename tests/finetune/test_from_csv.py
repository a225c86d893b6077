"""Detections in files: the numbers of the goldens, tubes, and everything that can't match refused with a reason."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.commands.evaluate import main
from finetune.detection.answers import Detections
from finetune.detection.final_test import write_detections
from pretrain.data.boxes.action_list import make_action_list

GOLDEN = Path(__file__).parents[1] / "goldens" / "ava_map"
LABELS = 'item {\n  name: "walk"\n  id: 12\n}\nitem {\n  name: "run"\n  id: 10\n}\n'
TRUTH = "film,0902,0.1,0.1,0.5,0.9,12,0\nfilm,0903,0.1,0.1,0.5,0.9,10,0\n"
FOUND = "film,0902,0.100,0.1,0.5,0.9,12,0.9\nfilm,0903,0.1,0.1,0.5,0.9,10,0.8\n"


def golden(variant: str, out: Path, *more: str) -> int:
    return main(["--from-csv", str(GOLDEN / "detections.csv"), "--truth", str(GOLDEN / "groundtruth.csv"),
                 "--labels", str(GOLDEN / "labelmap.pbtxt"), "--variant", variant, "--out", str(out),
                 *more])  # fmt: skip


@pytest.mark.parametrize("variant", ["activitynet", "slowfast", "alphaction"])
def test_numbers_of_the_official_evaluators(variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exclude = [] if variant == "activitynet" else ["--exclude", str(GOLDEN / "excluded.csv")]
    assert golden(variant, tmp_path / "out.json", *exclude) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    expected = json.loads((GOLDEN / "expected.json").read_text())
    assert result["mAP"] == pytest.approx(expected[variant]["mAP"], abs=1e-9)
    assert {one["name"]: one["AP"] for one in result["classes"]} == pytest.approx(expected[variant]["per_class"])
    shown = capsys.readouterr().out
    assert f"variant {variant} (numbers of other variants are not comparable)" in shown
    assert "detection keyframes unlisted" in shown and "excluded keyframes unmatched" in shown
    assert f"frame-mAP@0.5 {100 * result['mAP']:.2f} % ({variant}, 9 classes, 1 without truth left out)" in shown
    if variant == "slowfast":
        assert result["strict_percent"] == pytest.approx(expected["evad_strict"])


def test_the_official_variant_takes_no_exclusions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert golden("activitynet", tmp_path / "out.json", "--exclude", str(GOLDEN / "excluded.csv")) == 2
    assert "activitynet knows no excluded keyframes" in capsys.readouterr().err


def scored(tmp_path: Path, found: str = FOUND, truth: str = TRUTH, labels: str = LABELS, *more: str) -> int:
    for name, text in (("found.csv", found), ("truth.csv", truth), ("labels.pbtxt", labels)):
        (tmp_path / name).write_text(text)
    return main(["--from-csv", str(tmp_path / "found.csv"), "--truth", str(tmp_path / "truth.csv"),
                 "--labels", str(tmp_path / "labels.pbtxt"), *more])  # fmt: skip


def test_seconds_are_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scored(tmp_path, FOUND.replace("0902", "902").replace("0903", "903.0")) == 0
    assert "frame-mAP@0.5 100.00 %" in capsys.readouterr().out


@pytest.mark.parametrize(("variant", "mean"), [("activitynet", 50), ("alphaction", 100)])
def test_parts_of_seconds(variant: str, mean: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The official evaluator tells 902.4 from 902, the others cut it."""
    assert scored(tmp_path, FOUND.replace("0902", "902.4"), TRUTH, LABELS, "--variant", variant) == 0
    assert f"frame-mAP@0.5 {mean}.00 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (FOUND.replace("0.5,0.9", "320,200"), r"found.csv:1: box .* and 2 of 2 like it: shares"),
        (FOUND.replace(",12,", ",0,"), "class id 0, and the label map counts from 1: write ids"),
        (FOUND.replace(",12,", ",3,").replace(",10,", ",4,"), "none of its class ids [3, 4] ... is in the label map"),
        (FOUND.replace("film", "movie"), "2 of 2 keyframes are not among the 2 of"),
        (FOUND.replace("film", "movie"), "1 of its videos are not in the truth, ['movie']; there they are called like"),
        (FOUND.replace("0902", "2").replace("0903", "3"), "its seconds are 2 to 3, the truth's 902 to 903"),
        ("film,0902,0.1,0.1,0.5,0.9,12\n", "found.csv:1: no score"),
        ("film,0902,0.1,0.1,0.5,0.9,12,nan\n", "found.csv:1: last column 'nan': a number is expected"),
        ("film,0902\n", "found.csv: holds no box"),
    ],
)
def test_what_cannot_match_is_refused(
    found: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scored(tmp_path, found) == 2
    output = capsys.readouterr()
    assert "frame-mAP" not in output.out
    assert all(part in output.err for part in message.split(".*"))


def test_a_label_map_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--from-csv", "found.csv", "--truth", "truth.csv"]) == 2
    assert "--labels is missing" in capsys.readouterr().err


def test_neither_recipe_nor_torch(tmp_path: Path) -> None:
    scored(tmp_path)
    program = ("import sys; from finetune.commands.evaluate import main; "
               "code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)")  # fmt: skip
    command = [
        sys.executable,
        "-c",
        program,
        "--from-csv=found.csv",
        "--truth",
        "truth.csv",
        "--labels",
        "labels.pbtxt",
    ]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


OWN = ("video,time,x1,y1,x2,y2,label,person\nfilm,1234.567,0.1,0.1,0.5,0.9,walk,0\n"
       "film,1234.6,0.1,0.1,0.5,0.9,run,1\nfilm,1235,,,,,,\n")  # fmt: skip
OWN_FOUND = FOUND.replace("0902", "1234.567").replace("0903", "1234.6")


@pytest.mark.parametrize("variant", ["activitynet", "slowfast"])
def test_a_truth_of_ones_own_names_its_classes(
    variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keyframes within a second are two for the default variant; a false alarm on the empty one halves a class."""
    alarm = OWN_FOUND + "film,1235,0.1,0.1,0.5,0.9,10,0.95\n"
    assert scored(tmp_path, alarm, OWN, LABELS, "--variant", variant) == 0
    assert "frame-mAP@0.5 75.00 %" in capsys.readouterr().out
    assert scored(tmp_path, OWN_FOUND, OWN.replace("walk", "fly"), LABELS) == 2
    assert "truth.csv:2: class 'fly' is not in the label map, whose are ['run', 'walk']" in capsys.readouterr().err


def test_what_a_test_writes_is_read_at_the_annotated_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    box = np.array([[0.1, 0.1, 0.5, 0.9]], np.float32)
    answers = [Detections("film", time, box, np.array([scores], np.float32))
               for time, scores in ((1234.567, [0, 0, 0.9]), (1234.6, [0.9, 0, 0]), (902.0, [0, 0, 0.1]))]  # fmt: skip
    write_detections(answers, make_action_list("test", {1: "run", 2: "sit", 3: "walk"}), tmp_path / "found.csv")
    found = (tmp_path / "found.csv").read_text()
    assert [row.split(",")[1] for row in found.splitlines()] == ["1234.567", "1234.6", "902"]
    labels = LABELS.replace("12", "3").replace("10", "1")
    assert scored(tmp_path, found, OWN, labels) == 0 and "frame-mAP@0.5 100.00 %" in capsys.readouterr().out


def test_a_truth_in_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Frames of a truth may count from 0, those of detections from 1."""
    own = OWN.replace("time", "frame").replace("1234.567", "7").replace("1234.6", "8")
    found = FOUND.replace("0902", "8").replace("0903", "9")
    assert scored(tmp_path, found, own, LABELS) == 2
    assert "do they count from 0 or from 1? Say --first-frame" in capsys.readouterr().err
    assert scored(tmp_path, found, own, LABELS, "--first-frame", "0") == 0
    assert "frame-mAP@0.5 100.00 %" in capsys.readouterr().out
    assert scored(tmp_path, FOUND, TRUTH, LABELS, "--first-frame", "0") == 2
    assert "truth.csv has no column `frame`" in capsys.readouterr().err


def test_numbers_are_written_where_there_is_no_folder_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scored(tmp_path, FOUND, TRUTH, LABELS, "--out", str(tmp_path / "new/numbers.json")) == 0
    assert json.loads((tmp_path / "new/numbers.json").read_text())["mAP"] == 1
    assert scored(tmp_path, FOUND, TRUTH, LABELS, "--out", str(tmp_path)) == 2
    assert f"--out {tmp_path}: the numbers above can't be written" in capsys.readouterr().err


def test_boxes_outside_the_frame_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scored(tmp_path, FOUND.replace("0.100", "-0.30"), TRUTH, LABELS) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {"truth boxes outside the frame 0", "detection boxes outside the frame 1"} <= set(lines)


def test_persons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A person detector's file names no actions; of the truth's keyframe without a box the alarm counts."""
    truth = TRUTH + "film,0902,0.1,0.1,0.5,0.9,10,0\nfilm,0904\n"
    found = "film,0902,0.1,0.1,0.5,0.9,,0.9\nfilm,0903,0.1,0.1,0.5,0.9,,0.7\nfilm,0904,0.1,0.1,0.5,0.9,,0.8\n"
    (tmp_path / "truth.csv").write_text(truth)
    (tmp_path / "found.csv").write_text(found)
    words = ["--from-csv", str(tmp_path / "found.csv"), "--truth", str(tmp_path / "truth.csv"), "--persons"]
    assert main([*words, "--out", str(tmp_path / "out.json")]) == 0
    expected = (51 + 50 * 2 / 3) / 101
    shown = capsys.readouterr().out
    assert "2 persons, 3 boxes" in shown and f"person AP@0.5 {100 * expected:.2f} %" in shown
    assert json.loads((tmp_path / "out.json").read_text())["AP75"] == pytest.approx(expected)


def tube_files(tmp_path: Path, name: str = "run/a", label: int = 2, scale: float = 1.0) -> list[str]:
    """Truth of one video, 20 frames of class 1 (from 0), in a picture that is no square; boxes found exactly there."""
    boxes = np.tile(np.array([[20.0, 30.0, 60.0, 110.0]], dtype=np.float32), (20, 1)) + np.arange(20)[:, None]
    tube = np.column_stack([np.arange(1, 21), boxes]).astype(np.float32)
    content = {"labels": ["jump", "run"], "train_videos": [[]], "test_videos": [["run/a"]], "nframes": {"run/a": 25},
               "resolution": {"run/a": (240, 320)}, "gttubes": {"run/a": {1: [tube]}}}  # fmt: skip
    (tmp_path / "truth.pkl").write_bytes(pickle.dumps(content, protocol=2))
    lines = [
        f"{name},{int(row[0])},{','.join(f'{value * scale:.4f}' for value in row[1:])},{label},0.9\n" for row in tube
    ]
    (tmp_path / "found.csv").write_text("".join(lines))
    return ["--from-csv", str(tmp_path / "found.csv"), "--truth", str(tmp_path / "truth.pkl"), "--tubes",
            "--out", str(tmp_path / "out.json")]  # fmt: skip


@pytest.mark.parametrize("linking", ["act", "moc"])
def test_tubes(linking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tube_files(tmp_path), "--linking", linking]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert {name: one["mAP"] for name, one in result["frame_map"].items()} == pytest.approx(
        {"act": 1, "moc": 1, "annotated": 1, "voc": 1}
    )
    for one in result["video_map"].values():
        assert one["by_threshold"] == {"0.2": 1, "0.5": 1, "0.75": 1} and one["0.5:0.95"] == pytest.approx(1)
    shown = capsys.readouterr().out
    assert "1 videos, 1 true tubes, 1 detected; 20 boxes" in shown
    assert "video-mAP @0.2 100.00, @0.5 100.00, @0.75 100.00, @0.5:0.95 100.00 % (act)" in shown


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"label": 3}, "class id 3; "),
        ({"name": "run/b"}, "1 of 1 videos are not in this test split"),
        ({"scale": 0.003}, "no coordinate is above 2; pixels are expected"),
    ],
)
def test_tubes_that_cannot_match_are_refused(
    files: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tube_files(tmp_path, **files)) == 2
    assert message in capsys.readouterr().err


#: Two tubes of run/a in pixels, ids 1 and 2, and a box of a training video.
ROWS = [("run/a", frame, 20 + frame, 30, 60 + frame, 110, label, person)
        for label, person in ((2, 0), (1, 1)) for frame in range(1, 21)]  # fmt: skip


def other_truth(tmp_path: Path, form: str) -> list[str]:
    """The same truth in another form, boxes found exactly there; words of the command."""
    found = "".join(f"{','.join(map(str, row[:7]))},0.9\n" for row in ROWS)
    (tmp_path / "found.csv").write_text(found)
    (tmp_path / "list.txt").write_text("run/a.avi 1\n")
    more: list[str] = []
    if form == "pyannot":
        tubes = [
            {"label": label - 1, "sf": 0, "ef": 20, "boxes": np.array([[20 + f, 30, 40, 80] for f in range(1, 21)])}
            for label in (2, 1)
        ]
        videos = {name: {"label": 1, "numf": 22, "annotations": tubes} for name in ("run/a", "run/train")}
        (tmp_path / "truth").with_suffix(".pkl").write_bytes(pickle.dumps(videos))
        return [str(tmp_path / "truth.pkl"), "--videos", str(tmp_path / "list.txt")]
    if form == "yowo":
        for frame in range(1, 21):
            path = tmp_path / "texts" / "run" / "a" / f"{frame:05d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [f"{row[6]} {row[2]} {row[3]} {row[4]} {row[5]}\n" for row in ROWS if row[1] == frame]
            path.write_text("".join(lines))
        return [str(tmp_path / "texts")]
    names, start = {1: "a jump", 2: "b run"}, 1 if form == "names" else 0
    rows = [(*row[:6], names[row[6]] if form == "names" else row[6], row[7]) for row in reversed(ROWS)]
    text = "video,frame,x1,y1,x2,y2,label,person\n"
    text += "".join(f"{row[0]},{row[1] - 1 + start},{','.join(map(str, row[2:]))}\n" for row in rows)
    (tmp_path / "own.csv").write_text(text)
    if form == "names":
        more = ["--first-frame", "1"]
    return [str(tmp_path / "own.csv"), *more]


@pytest.mark.parametrize("form", ["pyannot", "yowo", "ids", "names"])
def test_other_forms_of_true_tubes(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = other_truth(tmp_path, form)
    out = tmp_path / "out.json"
    assert main(["--from-csv", str(tmp_path / "found.csv"), "--tubes", "--out", str(out), "--truth", *truth]) == 0
    result = json.loads(out.read_text())
    assert {name: one["mAP"] for name, one in result["frame_map"].items()} == pytest.approx(
        {"act": 1, "moc": 1, "annotated": 1, "voc": 1}
    )
    assert set(result["frame_map"]["voc"]["by_class"]) == {"1", "2"}
    if form == "yowo":
        assert "video_map" not in result and "so there is no video-mAP" in capsys.readouterr().out
    else:
        assert [one["0.5:0.95"] for one in result["video_map"].values()] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("pyannot", ["--videos"], "name those of the test with --videos"),
        ("names", ["--first-frame"], "do they count from 0 or from 1"),
        ("ids", {",10,": ",11,"}, "tube 1 of run/a: frame 12 follows 10"),
        ("ids", {"frame": "time"}, "a column `frame` is expected"),
        ("ids", {",2,0": ",,0"}, "its label is not among the 1 classes of"),
        ("pyannot", {}, "--fold is for ACT's pickle"),
    ],
)
def test_other_forms_that_cannot_match_are_refused(
    form: str, change: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = other_truth(tmp_path, form)
    if isinstance(change, list):
        words = words[:1]
    elif not change:
        words += ["--fold", "2"]
    else:
        text = Path(words[0]).read_text()
        for old, new in change.items():
            text = text.replace(old, new)
        Path(words[0]).write_text(text)
    assert main(["--from-csv", str(tmp_path / "found.csv"), "--tubes", "--truth", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_mean_of_all_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the second fold nothing is found in its place."""
    words = tube_files(tmp_path)
    content = pickle.loads((tmp_path / "truth.pkl").read_bytes())
    (tmp_path / "truth.pkl").write_bytes(pickle.dumps(content | {"test_videos": [["run/a"]] * 2}))
    found = (tmp_path / "found.csv").read_text()
    (tmp_path / "found_1.csv").write_text(found)
    (tmp_path / "found_2.csv").write_text("".join(f"run/a,{frame},1,1,9,9,2,0.9\n" for frame in range(1, 21)))
    assert main([*words, "--fold", "all"]) == 2
    assert "since folds share test videos; write {fold}" in capsys.readouterr().err
    words[1] = str(tmp_path / "found_{fold}.csv")
    assert main([*words, "--fold", "all"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert [result["folds"][fold]["frame_map"]["voc"]["mAP"] for fold in "12"] == pytest.approx([1, 0])
    assert {one["mAP"] for one in result["frame_map"].values()} == {0.5}
    assert [one["0.5:0.95"] for one in result["video_map"].values()] == pytest.approx([0.5, 0.5])
    assert "mean of 2 folds\nframe-mAP@0.5 50.00 % (act)" in capsys.readouterr().out


def test_an_unknown_linking_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tube_files(tmp_path), "--linking", "road"]) == 2
    assert "--linking: found 'road', allowed: act, moc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tubes", "--exclude", "a.csv", "--variant", "slowfast"], "--exclude, --variant: not read with --tubes"),
        (["--videos", "a.txt", "--fold", "2"], "--fold, --videos: not read without --tubes"),
        (["--persons", "--labels", "l", "--variant", "slowfast"], "--labels, --variant: not read with --persons"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--from-csv", "found.csv", "--truth", "truth.csv", *words]) == 2
    assert told in capsys.readouterr().err
