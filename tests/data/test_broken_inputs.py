"""Every input of the corpus has the same, known end under both decoders: used, or refused with a reason; no crash."""

import gc
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pretrain.data.decoders import open_video
from pretrain.data.members import Members
from pretrain.data.pack.discover import Item
from pretrain.data.pack.options import Options
from pretrain.data.pack.packed import Packed
from pretrain.data.pack.packers import pack_sample
from pretrain.data.pack.scan import index_folder
from pretrain.errors import DataError, SampleError
from pretrain.samples import sampling
from tests.data.broken_inputs import Broken, inputs
from tests.streams import training_stream

DECODERS = ("decord", "pyav")

#: What becomes of an input: streamed from a raw shard by decord, by PyAV (a number: frames that it has), and packed.
EXPECTED: dict[str, tuple[int | str, int | str, str]] = {
    "sound": (24, 24, "kept"),
    "empty": ("empty", "empty", "empty"),
    "zero_bytes": ("open", "open", "unreadable"),
    "text": ("open", "open", "unreadable"),
    "html_error_page": ("open", "open", "unreadable"),
    "cut_after_header": ("open", "open", "unreadable"),
    "index_in_front_cut_30": ("open", "decode", "unreadable"),
    "index_in_front_cut_60": ("open", "decode", "damaged"),
    "index_in_front_cut_95": ("open", "decode", "damaged"),
    "index_at_end_cut_50": ("open", "open", "unreadable"),
    "index_at_end_last_byte_missing": (24, 24, "kept"),
    "index_missing": ("open", "open", "unreadable"),
    "index_only": ("open", "empty", "no-frames"),
    "zeroed_range": ("decode", "decode", "damaged"),
    "random_range": ("decode", "decode", "damaged"),
    "bit_flips": (24, "decode", "damaged"),
    "zeroed_index": ("open", "open", "unreadable"),
    "flipped_index": ("open", "open", "unreadable"),
    "junk_behind_the_end": (24, 24, "kept"),
    "audio_only": ("open", "open", "no-video"),
    "with_sound": (24, 24, "kept"),
    "one_frame": (1, 1, "kept"),
    "two_frames": (2, 2, "kept"),
    "no_frames": ("empty", "empty", "empty"),
    "variable_rate": (24, 24, "kept"),
    "odd_size": (24, 24, "kept"),
    "tiny": ("decode", 24, "inexact"),
    "very_wide": (8, 8, "kept"),
    "huge": (2, 2, "kept"),
    "rotated_90": (24, 24, "kept"),
    "ten_bit": (24, 24, "kept"),
    "hdr": (24, 24, "kept"),
    "grey": (24, 24, "kept"),
    "full_range": (24, 24, "kept"),
    "single_key_frame": (120, 120, "kept"),
    "all_key_frames": (24, 24, "kept"),
    "open_gop": (40, 40, "kept"),
    "interlaced": (24, 24, "kept"),
    "lost_first_key_frame": ("decode", 23, "damaged"),
    "lost_packets": (32, 32, "damaged"),
    "lost_first_group": (32, 32, "kept"),
    "edit_list": (24, 18, "encoded"),
    "late_start": (24, 24, "kept"),
    "zero_time_scale": (9, 1, "damaged"),
    "zero_rate": ("open", "decode", "encoded"),
    "lying_size": (24, 24, "kept"),
    "unknown_codec": ("open", "decode", "no-video"),
    "hevc": (24, 24, "kept"),
    "av1": ("open", 24, "encoded"),
    "mpeg4": (24, 24, "encoded"),
    "jpeg_in_mp4": ("open", 1, "kept"),
    "matroska_in_mp4": (24, 24, "kept"),
    "fragmented": (24, 24, "kept"),
    "fragmented_cut_60": ("open", "decode", "encoded"),
    "matroska_cut_60": (10, 10, "kept"),
    "matroska_bit_flips": (8, "decode", "encoded"),
    "transport_stream": (24, 24, "kept"),
    "transport_stream_cut_60": (13, 13, "encoded"),
    "transport_stream_packets_lost": (22, "decode", "kept"),
    "avi_packed_b_frames": (24, 24, "kept"),
    "avi_mjpeg": (24, 24, "kept"),
    "avi_cut_60": ("open", "decode", "damaged"),
    "mpeg_program_stream": (24, 24, "kept"),
    "vp9_with_alpha": (24, 24, "kept"),
    "vp8": (24, 24, "encoded"),
    "quicktime_png": (24, 24, "kept"),
    "gif": ("open", 24, "encoded"),
    "raw_h264": ("open", "decode", "encoded"),
}

#: Inputs some of whose frames can't be had: a clip elsewhere than that of EXPECTED, which is the last, may be refused.
DEPENDS_ON_CLIP = {"lost_packets", "lost_first_key_frame"}


@pytest.fixture(scope="module")
def corpus() -> dict[str, Broken]:
    return inputs()


def streamed(data: bytes, decoder: str) -> int | str:
    """Frames of a video from which a clip can be made, or why it can't."""
    try:
        with open_video(data, decoder) as reader:
            start = sampling.clip_starts(reader.num_frames, 8, 2) - 1
            clip = reader.frames(sampling.clip_frames(reader.num_frames, 8, 2, start))
            assert clip.shape[0] == 8 and clip.dtype.name == "uint8"
            return reader.num_frames
    except SampleError as error:
        return error.reason


def packed(path: Path, folder: Path, decoders: tuple[str, ...]) -> str:
    """How a video gets into a shard, or why not."""
    options = Options(copy=True, preset="ultrafast", reads=2, decoders=decoders)
    found = pack_sample(Item(str(path), path.name, key=path.stem), options, str(folder))
    if not isinstance(found, Packed):
        return found.reason
    return "kept" if found.facts["reencoded"] is None else "encoded"


def test_the_corpus_is_large(corpus: dict[str, Broken]) -> None:
    assert corpus.keys() == EXPECTED.keys() and len(corpus) >= 60
    assert sum(isinstance(end, str) for end, _, _ in EXPECTED.values()) >= 20


@pytest.mark.parametrize("decoder", DECODERS)
def test_end_of_each_in_training(decoder: str, corpus: dict[str, Broken]) -> None:
    found = {name: streamed(one.data, decoder) for name, one in corpus.items()}
    assert found == {name: ends[DECODERS.index(decoder)] for name, ends in EXPECTED.items()}


def test_end_of_each_in_packing(corpus: dict[str, Broken], tmp_path: Path) -> None:
    """What packing keeps, both decoders read exactly."""
    found = {}
    for name, one in corpus.items():
        path = tmp_path / f"{name}.{one.ending}"
        path.write_bytes(one.data)
        found[name] = packed(path, tmp_path, DECODERS)
    assert found == {name: ends[2] for name, ends in EXPECTED.items()}


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(("decoder", "workers"), [("decord", 1), ("pyav", 0)])
def test_a_raw_foreign_shard(
    decoder: str, workers: int, corpus: dict[str, Broken], tmp_path: Path, make_recipe: Callable[..., Any]
) -> None:
    """All of them in one shard, next to sound ones: each broken one is replaced, with its reason."""
    good = corpus["sound"].data
    files = [(f"{name}.{one.ending}", one.data) for name, one in corpus.items()]
    write_tar(tmp_path / "foreign.tar", [*files, *((f"good{number}.mp4", good) for number in range(60))])
    index_folder(str(tmp_path))
    recipe = make_recipe(
        {"foreign": str(tmp_path)}, samples=4, decoder=decoder, workers=workers, bad_attempts=30, deadline_s=120.0
    )
    stream = training_stream(recipe)
    bad, used = {}, set()
    for _ in range(stream.steps_per_epoch * stream.accumulation):
        batch = next(stream)
        bad |= {record.key: record.reason for record in batch["bad"] if record.attempt == 0}
        used |= set(batch["key"])
    stream.close()
    ends = {name: expected[DECODERS.index(decoder)] for name, expected in EXPECTED.items()}
    for key in DEPENDS_ON_CLIP & bad.keys():
        assert bad.pop(key) == "decode"
    refused = {key for key, end in ends.items() if isinstance(end, str)}
    unreadable = {key for key in refused if ends[key] != "decode"}
    assert bad == {key: ends[key] for key in bad}
    assert len(unreadable - bad.keys()) <= 4, "the order leaves out a few"
    assert used.isdisjoint(unreadable), "of a damaged one, another clip may be sound"


def test_a_tar_cut_in_a_member_is_not_indexed(corpus: dict[str, Broken], tmp_path: Path) -> None:
    files = [(f"{number}.mp4", corpus["sound"].data) for number in range(3)]
    for name, left in (("in_a_member", 0.5), ("in_a_header", 0.34), ("without_its_end", 0.9)):
        folder = tmp_path / name
        folder.mkdir()
        write_tar(folder / "cut.tar", files)
        whole = (folder / "cut.tar").read_bytes().rstrip(b"\0")
        (folder / "cut.tar").write_bytes(whole[: int(len(whole) * left)])
        with pytest.raises(DataError, match="cut.tar: (not a plain, whole tar file|no tar end marker)"):
            index_folder(str(folder))


@pytest.mark.parametrize("facts", [b"", b"{", b"[1]", b"null", b"\xff\xfe"])
def test_a_json_that_is_none(facts: bytes) -> None:
    with pytest.raises(SampleError, match="label: the sample's json"):
        _ = Members({"json": facts}).label


@pytest.mark.parametrize("text, label", [("17\n", 17), ("-1", -1), ("--5", "--5"), ("-", "-"), ("5²", "5²"), ("", "")])
def test_a_class_is_a_number_or_a_name(text: str, label: int | str) -> None:
    assert Members({"cls": text.encode()}).label == label


def test_a_class_in_another_encoding_is_no_class() -> None:
    """With a stand-in for the letter, caf\u00e9 and caf\u00e8 would be one class."""
    with pytest.raises(SampleError, match="label: its cls is not in UTF-8"):
        _ = Members({"cls": b"caf\xe9"}).label
    assert Members({"cls": "\ufeffcaf\u00e9\n".encode()}).label == "caf\u00e9"


def test_an_error_of_a_sample_is_the_same_in_another_process() -> None:
    error = pickle.loads(pickle.dumps(SampleError("decode", "no frames")))
    assert (type(error), error.reason, str(error)) == (SampleError, "decode", "decode: no frames")


def test_a_json_may_lie_or_miss(corpus: dict[str, Broken], tmp_path: Path, make_recipe: Callable[..., Any]) -> None:
    """Training goes by the video; only the label is taken from the json."""
    lies = {"label": 3, "frames": 99999, "fps": -1, "width": 0, "height": "tall"}
    files = [("a.json", json.dumps(lies).encode()), ("a.mp4", corpus["sound"].data), ("b.mp4", corpus["sound"].data)]
    write_tar(tmp_path / "shard.tar", files)
    index_folder(str(tmp_path))
    recipe = make_recipe({"one": str(tmp_path)}, samples=2, lanes=1)
    batch = next(training_stream(recipe))
    assert sorted(set(batch["key"])) == ["a", "b"] and batch["bad"] == []


@pytest.mark.parametrize("decoder", DECODERS)
def test_memory_does_not_grow(decoder: str, corpus: dict[str, Broken]) -> None:
    small = [one.data for name, one in corpus.items() if name not in ("huge", "single_key_frame", "very_wide")]

    def rounds(count: int) -> int:
        for _ in range(count):
            for data in small:
                streamed(data, decoder)
        gc.collect()
        return int(psutil.Process().memory_info().rss)

    before = rounds(5)
    assert rounds(10) - before < 25 << 20, "10 rounds of 60 videos; a leaked decoder would be some MB each"
