"""Segments: pieces of videos are cut out frame by frame exactly, and cost what they hold."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

from pretrain.commands.pack import main
from pretrain.data.decoders import open_video
from pretrain.data.index import load_index
from pretrain.data.pack.discover import Item, gather
from pretrain.data.pack.film_index import FilmIndex, cut_items, read_index
from pretrain.data.pack.linked_shards import write_links
from pretrain.data.pack.options import Options
from pretrain.data.pack.pack_plan import Part, make_plan
from pretrain.data.pack.packed import Packed, Rejected
from pretrain.data.pack.packers import pack_sample
from pretrain.data.time_segment import Segment
from pretrain.errors import RecipeError
from pretrain.runtime import storage
from tests.films import HARD, UNEVEN, film_maker, numbers_of, write_film

FAST = Options(preset="ultrafast", crf=10, gop=8, audio=True)
KEEP = Options(preset="ultrafast", crf=10, gop=8, copy=True)
KINDS: dict[str, dict[str, Any]] = {
    "front.mp4": {"front": True},
    "end.mp4": {"audio": True},
    "no_b.mp4": {"b_frames": 0},
    "long_gop.mp4": {"gop": 250},
    "film.mkv": {"audio": True},
    "film.webm": {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8", "b": "400k"}},
    "stream.ts": {"container": "mpegts"},
    **HARD,
}


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The film of a kind; read only."""
    return film_maker(tmp_path_factory.mktemp("films"), KINDS)


def cut(path: Path, segment: Segment, options: Options = FAST) -> Packed | Rejected:
    folder = path.parent / "out"
    folder.mkdir(exist_ok=True)
    return pack_sample(Item(str(path), path.name, key="k", segment=segment), options, str(folder))


def shown_in(kind: str, start: float, end: float) -> list[int]:
    times = UNEVEN if "uneven" in kind else range(0, 250 * 40, 40)
    hidden = KINDS[kind].get("hidden", 0)
    return [hidden + number for number, time in enumerate(times) if 1000 * start <= time < 1000 * end]


@pytest.mark.parametrize("options", [FAST, KEEP], ids=["encoded", "copy"])
@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_a_segment(kind: str, options: Options, films: Callable[[str], Path]) -> None:
    for start, end in ((0, 1), (2, 4), (3.2, 3.68), (1.52, 1.56), (8.04, 60)):
        packed = cut(films(kind), Segment(start, end), options)
        assert isinstance(packed, Packed), packed
        data = Path(packed.files["mp4"]).read_bytes()
        for decoder in ("pyav", "decord"):
            with open_video(data, decoder) as reader:
                assert numbers_of(reader.frames(range(reader.num_frames))) == shown_in(kind, start, end)
        assert packed.facts["frames"] == len(shown_in(kind, start, end))
        assert packed.facts["segment"] == {"start": start, "end": end}


def test_streams_are_kept_between_key_frames_only(films: Callable[[str], Path]) -> None:
    between = cut(films("end.mp4"), Segment(2, 4), KEEP)
    inside = cut(films("end.mp4"), Segment(2.04, 4), KEEP)
    assert isinstance(between, Packed) and between.facts["reencoded"] is None
    assert isinstance(inside, Packed) and "key frames" in inside.facts["reencoded"]
    assert between.facts["sha256"] != inside.facts["sha256"]
    last = cut(films("open_gop.mp4"), Segment(9.6, None), KEEP)
    assert isinstance(last, Packed) and last.facts["reencoded"] is None, "pictures that lead into it are left behind"


def test_a_segment_costs_its_own_bytes(tmp_path: Path) -> None:
    film = write_film(tmp_path / "minute.mp4", frames=1500)
    storage.write_bytes("memory://films/minute.mp4", film.read_bytes())
    item = Item("memory://films/minute.mp4", "minute.mp4", key="k", segment=Segment(30, 32))
    packed = pack_sample(item, FAST, str(tmp_path))
    assert isinstance(packed, Packed) and packed.facts["original"]["bytes"] == film.stat().st_size
    with open_video(Path(packed.files["mp4"]).read_bytes(), "pyav") as reader:
        assert numbers_of(reader.frames(range(reader.num_frames))) == list(range(750, 800))
    assert packed.bytes_read < film.stat().st_size / 6
    gone = pack_sample(Item("memory://films/gone.mp4", "gone.mp4", key="k", segment=Segment(0, 2)), FAST, str(tmp_path))
    assert isinstance(gone, Rejected) and gone.reason == "missing"


def test_a_segment_of_a_turned_video_is_upright(make_video: Callable[..., Path], tmp_path: Path) -> None:
    path = make_video(tmp_path / "phone.mp4", frames=50, rotation=90, audio=True)
    for options in (FAST, KEEP):
        packed = cut(path, Segment(0.4, 1.2), options)
        assert isinstance(packed, Packed) and packed.facts["original"]["rotation"] == 90
        assert (packed.facts["width"], packed.facts["height"], packed.facts["frames"]) == (96, 128, 20)


def test_sound_of_a_segment(films: Callable[[str], Path]) -> None:
    import av

    packed = cut(films("end.mp4"), Segment(2.5, 4.5))
    assert isinstance(packed, Packed) and packed.facts["audio"] == "aac"
    with av.open(packed.files["mp4"]) as container:
        sound = container.streams.audio[0]
        times = [float(packet.pts * packet.time_base) for packet in container.demux(sound) if packet.pts is not None]
    assert times[0] < 0.06 and times[-1] == pytest.approx(2, abs=0.1)


def sound_ahead(source: Path, path: Path, container: str | None = None, lead: float = 1.5) -> Path:
    """The packets of a film, with the sound some seconds in front of its pictures in the file."""
    import av

    options = {"max_interleave_delta": "1"}
    with av.open(str(source)) as film, av.open(str(path), "w", format=container, options=options) as out:
        copies = {stream.index: out.add_stream_from_template(stream) for stream in film.streams}
        packets = [packet for packet in film.demux() if packet.size]
        packets.sort(key=lambda one: one.dts * one.time_base - (lead if one.stream.type == "audio" else 0))
        for packet in packets:
            packet.stream = copies[packet.stream.index]
            out.mux(packet)
    return path


@pytest.mark.parametrize("name", ["ahead.mp4", "ahead.ts", "ahead.mkv"])
def test_sound_that_lies_ahead_of_its_pictures(name: str, films: Callable[[str], Path], tmp_path: Path) -> None:
    import av

    path = sound_ahead(films("end.mp4"), tmp_path / name, "mpegts" if name == "ahead.ts" else None)
    for start, end in ((4, 6), (4.5, 6)):
        packed = cut(path, Segment(start, end))
        assert isinstance(packed, Packed)
        with av.open(packed.files["mp4"]) as container:
            packets = [one for one in container.demux(audio=0) if one.pts is not None]
        assert packets[0].pts * packets[0].time_base < 0.05
        assert len(packets) == pytest.approx((end - start) * 44100 / 1024, abs=2), "without a gap"


def test_what_is_no_segment(films: Callable[[str], Path], tmp_path: Path) -> None:
    for segment, reason in ((Segment(11, 12), "segment"), (Segment(1.001, 1.002), "segment")):
        found = cut(films("end.mp4"), segment)
        assert isinstance(found, Rejected) and found.reason == reason, found
    old = write_film(tmp_path / "old.avi", b_frames=0)
    found = cut(old, Segment(1, 2))
    assert isinstance(found, Rejected) and found.reason == "unstamped"
    assert len(cut_items([Item(str(old), "old.avi")], 2.0, at_keys=False)) == 1, "whole, it can be packed"
    manifest = tmp_path / "list.csv"
    manifest.write_text("path,start,end\na.mp4,3,3\na.mp4,4,2\na.mp4,-1,2\na.mp4,x,2\nframes,1,2\n")
    with pytest.raises(RecipeError) as caught:
        gather([str(manifest)])
    assert [problem.split(":")[1] for problem in caught.value.problems] == ["2", "3", "4", "5", "6"]


def test_two_segments_are_two_samples(films: Callable[[str], Path], tmp_path: Path) -> None:
    path = films("end.mp4")
    rows = [("0", "2", "a"), ("1.5", "3", "b"), ("1.54", "3", "a"), ("1.5", "3", "a"), ("8", "", "c")]
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "start", "end", "label"), *((path, *row) for row in rows)])
    out = tmp_path / "out"
    arguments = [str(tmp_path / "list.csv"), str(out), "--preset", "ultrafast", "--workers", "0"]
    assert main(arguments) == 0
    samples = list(wds.WebDataset([str(path) for path in out.glob("*.tar")], shardshuffle=False))
    stem = str(path.with_suffix(""))[1:].replace(".", "_")
    assert sorted(sample["__key__"].removeprefix(stem) for sample in samples) == [
        "_00000000-00002000", "_00001500-00003000", "_00001540-00003000", "_00008000-end"
    ]  # fmt: skip
    frames = {
        json.loads(sample["json"])["segment"]["start"]: json.loads(sample["json"])["frames"] for sample in samples
    }
    assert frames == {0: 50, 1.5: 37, 1.54: 36, 8: 50}
    reasons = [json.loads(line)["reason"] for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert reasons == ["repeated"], "the same bounds twice"


def test_copies_of_a_film_have_the_same_segments(films: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "copy.mp4").write_bytes(films("end.mp4").read_bytes())
    one, two = cut(films("end.mp4"), Segment(1, 3)), cut(tmp_path / "copy.mp4", Segment(1, 3))
    assert isinstance(one, Packed) and isinstance(two, Packed) and one.facts["sha256"] == two.facts["sha256"]


def test_pieces(films: Callable[[str], Path]) -> None:
    items = [Item(str(films("end.mp4")), "end.mp4"), Item("gone.mp4", "gone.mp4")]
    plain = cut_items(items, 3.0, at_keys=False)
    assert [one.segment for one in plain[:-1]] == [Segment(0, 3), Segment(3, 6), Segment(6, None)] and plain[
        -1
    ] is items[1]
    assert [one.segment for one in cut_items(items[:1], 3.3, at_keys=True)] == [
        Segment(0, 3), Segment(3, 7), Segment(7, None)
    ]  # fmt: skip
    assert cut_items(items[:1], 7.0, at_keys=False) == items[:1], "a rest shorter than half a piece is no piece"
    assert cut_items(plain[:1], 1.0, at_keys=False) == plain[:1], "a segment stays as it is"
    keys = [one.key for one in make_plan(plain[:3], shuffle=False).items]
    assert keys == ["end_00000000-00003000", "end_00003000-00006000", "end_00006000-end"]


def test_a_cut_film_is_kept_and_complete(films: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = [str(films("film.mkv")), str(tmp_path / "out"), "--cut", "3.3", "--copy", "--order", "given"]
    assert main([*arguments, "--workers", "0"]) == 0
    found = []
    for sample in wds.WebDataset([str(path) for path in (tmp_path / "out").glob("*.tar")], shardshuffle=False):
        assert json.loads(sample["json"])["reencoded"] is None
        with open_video(sample["mp4"], "pyav") as reader:
            found += numbers_of(reader.frames(range(reader.num_frames)))
    assert found == list(range(250))


def test_pieces_of_an_edited_film_lie_between_its_key_frames(films: Callable[[str], Path]) -> None:
    """Frames that its edit list hides are in the index as well, in decoding order."""
    items = [Item(str(films("edited.mp4")), "edited.mp4")]
    pieces = cut_items(items, 3.3, at_keys=True)
    assert [one.segment for one in pieces] == [Segment(0, 3.6), Segment(3.6, 6.6), Segment(6.6, None)]
    packed = [cut(films("edited.mp4"), one.segment, KEEP) for one in pieces if one.segment is not None]
    assert [one.facts["reencoded"] for one in packed[1:] if isinstance(one, Packed)] == [None, None]


def test_a_film_that_can_not_be_cut_says_why(
    films: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = [Item(str(films("live.mkv")), "live.mkv")]
    assert cut_items(items, 3.0, at_keys=False) == items
    assert "live.mkv: stays whole: its header states no duration" in caplog.text


def test_a_cut_film_in_place_is_looked_into_once(films: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "end.mp4"
    path.write_bytes(films("end.mp4").read_bytes())
    indexes: dict[str, FilmIndex] = {}
    items = make_plan(cut_items([Item(str(path), "end.mp4")], 3.0, True, indexes=indexes)).items
    path.write_bytes(bytes(path.stat().st_size))
    write_links(list(items), str(tmp_path / "out"), indexes)
    samples = list(wds.WebDataset([str(tmp_path / "out/links-000000.tar")], shardshuffle=False))
    assert len(samples) == 3 and all(json.loads(sample["span"])["index"] for sample in samples)


def test_segments_in_place_are_checked_without_reading_the_film_for_each(
    films: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = str(tmp_path / "out")
    assert main(["--in-place", str(films("end.mp4")), out, "--cut", "5"]) == 0
    assert main(["--check", out, "--workers", "0", "--check-decoders", "decord,pyav"]) == 0
    assert "['decord'] would read all of a film for each" in caplog.text
    assert "all of it is read for every sample" not in caplog.text


def test_a_list_that_leaves_nothing_to_link(
    films: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.csv").write_text(f"path,start,end\n{films('end.mp4')},11,12\n")
    assert main(["--in-place", str(tmp_path / "m.csv"), str(tmp_path / "out")]) == 1
    assert "nothing to link" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_plans_without_segments_keep_their_fingerprint() -> None:
    plan = make_plan([Item("/a.mp4", "a.mp4", 3, size=7), Item("/b", "b", frames=(1, 9), is_folder=True)])
    assert plan.fingerprint("options") == "3c971c929fd5b9f7"
    segments = [Item("/a.mp4", "a.mp4", size=7, segment=Segment(n, n + 1)) for n in range(64)]
    parts = [len(make_plan(segments).part(Part(index, 4))) for index in range(4)]
    assert sum(parts) == 64 and min(parts) > 4, "a film is not the work of one part"


def test_values_of_a_list_go_along_with_segments(films: Callable[[str], Path], tmp_path: Path) -> None:
    row = {"path": str(films("end.mp4")), "start": 1, "end": 2, "boxes": [[1, 2, 3, 4]], "key": "k"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "out"
    arguments = [str(tmp_path / "m.jsonl"), str(out), "--with", "boxes", "--preset", "ultrafast"]
    assert main([*arguments, "--workers", "0"]) == 0
    (sample,) = wds.WebDataset([str(path) for path in out.glob("*.tar")], shardshuffle=False)
    assert json.loads(sample["boxes.json"]) == [[1, 2, 3, 4]] and json.loads(sample["json"])["frames"] == 25


def test_annotations_of_public_sets(tmp_path: Path) -> None:
    for name in ("x/aaa.mp4", "x/bbb_000010_000020.mkv", "v_ccc.webm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "kinetics.csv").write_text(
        "label,youtube_id,time_start,time_end,split\nsailing,aaa,3,13,train\nsailing,bbb,10,20,train\nhi,ddd,0,9,val\n"
    )
    (tmp_path / "hacs.csv").write_text("classname,youtube_id,subset,start,end,label\nskiing,aaa,training,1.5,3.5,-1\n")
    content = {"ccc": {"subset": "training", "duration": 80.5, "annotations": [
        {"label": "knitting", "segment": [1.25, 9.5]}, {"label": "rest", "segment": [20, 30]}]},
        "eee": {"subset": "testing", "annotations": []}}  # fmt: skip
    (tmp_path / "activitynet.json").write_text(json.dumps({"version": "1.3", "database": content}))
    items = gather([str(tmp_path / name) for name in ("kinetics.csv", "hacs.csv", "activitynet.json")])
    found = [(Path(one.path).relative_to(tmp_path).as_posix(), one.segment, one.label) for one in items]
    assert found == [
        ("x/aaa.mp4", Segment(3, 13), "sailing"), ("x/bbb_000010_000020.mkv", None, "sailing"),
        ("ddd.mp4", Segment(0, 9), "hi"), ("x/aaa.mp4", Segment(1.5, 3.5), "skiing"),
        ("v_ccc.webm", Segment(1.25, 9.5), "knitting"), ("v_ccc.webm", Segment(20, 30), "rest"),
    ]  # fmt: skip
    assert items[0].meta == {"youtube_id": "aaa", "split": "train"} and items[3].meta["shows_class"] == "-1"
    (tmp_path / "coco.json").write_text('{"images": []}')
    with pytest.raises(RecipeError, match=r"coco.json: not ActivityNet's json"):
        gather([str(tmp_path / "coco.json")])


def test_an_index_without_the_film(films: Callable[[str], Path]) -> None:
    for kind in ("end.mp4", "front.mp4", "film.mkv"):
        index = read_index(str(films(kind)))
        assert [round(float(stamp * index.time_base), 3) for stamp, _ in index.keys] == list(range(10))
        assert index.duration == pytest.approx(10, abs=0.1) and (index.stamps is None) == (kind == "film.mkv")
    assert read_index(str(films("uneven.mp4"))).stamps is None and not read_index(str(films("stream.ts"))).keys


def test_a_packed_set_of_segments_is_indexed_and_checked(films: Callable[[str], Path], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert main([str(films("end.mp4")), out, "--cut", "5", "--preset", "ultrafast", "--workers", "0"]) == 0
    assert load_index(out).samples == 2 and main(["--check", out, "--workers", "0"]) == 0
