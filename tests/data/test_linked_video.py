"""Films and segments in place: the right frames, for the bytes that they need."""

import contextlib
import functools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pytest

from pretrain.commands.pack import main
from pretrain.data.decoders import open_video
from pretrain.data.decoders.decord_reader import DecordReader
from pretrain.data.fetch import SampleReader
from pretrain.data.index import load_index
from pretrain.data.linked_video import BLOCK, LIMIT, LinkedVideo, Span, open_link
from pretrain.data.members import parse_sample
from pretrain.data.pack import linked_shards
from pretrain.data.pack.film_index import read_index
from pretrain.data.time_segment import Segment
from pretrain.errors import DataError, SampleError
from pretrain.runtime import retries, storage
from tests.conftest import S3Server
from tests.faults.proxy import FaultProxy
from tests.films import HARD, UNEVEN, film_maker, numbers_of, skip_without, write_film
from tests.pack.media_files import sound_bytes, wave

KINDS: dict[str, dict[str, Any]] = {
    "front.mp4": {"front": True, "audio": True},
    "end.mp4": {"audio": True},
    "long_gop.mp4": {"gop": 250},
    "film.mkv": {"audio": True},
    "stream.ts": {"container": "mpegts"},
    "old.avi": {"b_frames": 0},
    **HARD,
}
FRAMES = 18_000
INEXACT = ("stream.ts", "old.avi", "live.mkv", "edited.mp4", "open_gop.mp4")
SEGMENTS = (Segment(0, 1), Segment(2, 4), Segment(3.2, 3.68), Segment(8.04, None), None)


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The film of a kind; read only."""
    return film_maker(tmp_path_factory.mktemp("linked"), KINDS)


@pytest.fixture(scope="session")
def long_film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half an hour at 10 frames a second, with its index at the end."""
    path = tmp_path_factory.mktemp("long") / "film.mp4"
    return write_film(path, frames=FRAMES, fps=10, gop=50, options={"crf": "8"})


@functools.cache
def linked(path: str, segment: Segment | None) -> Span:
    return read_index(path).span(segment)


def shown_in(kind: str, segment: Segment | None) -> list[int]:
    times = UNEVEN if "uneven" in kind else range(0, 250 * 40, 40)
    start, end = segment or (0, None)
    hidden = KINDS[kind].get("hidden", 0)
    return [hidden + number for number, time in enumerate(times) if 1000 * start <= time < 1000 * (end or 1e9)]


#: The other decoders do not read some kinds exactly; packing finds that out, linking can't.
EXACT = [("pyav", kind) for kind in KINDS] + [
    (decoder, kind) for decoder in ("decord", "torchcodec") for kind in KINDS if kind not in INEXACT
]


@pytest.mark.parametrize(("decoder", "kind"), EXACT)
def test_frames_of_segments_and_films(kind: str, decoder: str, films: Callable[[str], Path]) -> None:
    skip_without(decoder)
    path = str(films(kind))
    rng = np.random.default_rng(0)
    for segment in SEGMENTS:
        video = LinkedVideo(path, linked(path, segment))
        expected = shown_in(kind, segment)
        with open_video(video, decoder) as reader:
            assert reader.num_frames == len(expected)
            chosen = np.sort(rng.choice(len(expected), min(9, len(expected)), replace=False))
            for wanted in (chosen, chosen[::-1], [0], [len(expected) - 1], range(min(len(expected), 30))):
                assert numbers_of(reader.frames(wanted)) == [expected[index] for index in wanted]
            times = np.array(UNEVEN if "uneven" in kind else range(0, 300 * 40, 40))[expected] / 1000
            assert reader.times() == pytest.approx(times - times[0], abs=0.0006)
            assert reader.indices_at(times - times[0]).tolist() == list(range(len(expected)))


@pytest.mark.parametrize("kind", KINDS)
def test_all_frames_in_turn(kind: str, films: Callable[[str], Path]) -> None:
    """Of a segment too, without the film before it; a reader is as good as new afterwards."""
    path, segment = films(kind), Segment(2.0, 3.0)
    for video in (path.read_bytes(), LinkedVideo(str(path), linked(str(path), segment))):
        expected = shown_in(kind, None if isinstance(video, bytes) else segment)
        with open_video(video, "pyav") as reader:
            assert [number for frame in reader.in_turn() for number in numbers_of(frame[None])] == expected
            assert numbers_of(reader.frames([3, 1])) == [expected[3], expected[1]]


def test_promised_and_listed_segments_are_the_same(films: Callable[[str], Path]) -> None:
    path = str(films("open_gop.mp4"))
    for segment in SEGMENTS:
        with open_video(LinkedVideo(path, linked(path, segment)), "pyav") as one:
            with open_video(LinkedVideo(path, Span(os.path.getsize(path), segment)), "pyav") as two:
                assert isinstance(one.stamps, range) and list(one.stamps) == two.stamps  # type: ignore[attr-defined]
                assert (one.frames(range(12)) == two.frames(range(12))).all()


def test_segments_of_a_film_whose_time_stamps_repeat(films: Callable[[str], Path], tmp_path: Path) -> None:
    """Its frames can only be counted, and a segment is read from a key frame on."""
    path = tmp_path / "twice.mkv"
    with av.open(str(films("old.avi"))) as one, av.open(str(path), "w") as two:
        stream = two.add_stream_from_template(one.streams.video[0])
        for number, packet in enumerate(one.demux(one.streams.video[0])):
            packet.stream = stream
            packet.pts = packet.dts = number - (number % 20 == 11)
            two.mux([packet] if packet.size else [])
    for segment in SEGMENTS:
        expected = shown_in("old.avi", segment)
        video = LinkedVideo(str(path), linked(str(path), segment))
        with open_video(video, "pyav") as reader:
            assert reader.num_frames == len(expected), segment
            assert numbers_of(reader.frames([0, len(expected) - 1])) == [expected[0], expected[-1]]
        with pytest.raises(SampleError, match="share a time"):  # it gave frame 92 for 91 once in fifteen times
            open_video(video, "decord")


def test_a_wrong_promise_costs_bytes_only(films: Callable[[str], Path]) -> None:
    path = str(films("end.mp4"))
    right = linked(path, None).stamps
    assert right is not None
    for wrong in (range(right.start + 7, right.stop + 7, right.step), right[:-3], right[::2]):
        with open_video(LinkedVideo(path, Span(os.path.getsize(path), Segment(2, 3), wrong)), "pyav") as reader:
            assert numbers_of(reader.frames([0, 24])) == [50, 74] and reader.num_frames == 25


def test_uneven_frames_that_are_promised_to_be_even(tmp_path: Path) -> None:
    """A promise that the header agrees with, and the packets on the way to the frames do not."""
    times = np.cumsum([0, *[80, 40, 40, 20, 20] * 40]).tolist()
    path = str(write_film(tmp_path / "film.mp4", frames=len(times), times_ms=times))
    promise = range(0, 640 * len(times), 640)
    for wanted in ([2, 9], [100, 101], [200]):
        with open_video(LinkedVideo(path, Span(os.path.getsize(path), None, promise)), "pyav") as reader:
            assert reader.stamps == promise, "or the header gives the lie away"  # type: ignore[attr-defined]
            assert numbers_of(reader.frames(wanted)) == wanted


def test_segments_without_frames(films: Callable[[str], Path]) -> None:
    for kind in ("end.mp4", "film.mkv", "old.avi"):
        path = str(films(kind))
        for segment in (Segment(11, 12), Segment(1.001, 1.002)):
            for decoder in ("pyav", "decord"):
                with pytest.raises(SampleError) as caught:
                    open_video(LinkedVideo(path, linked(path, segment)), decoder)
                assert caught.value.reason == "segment", (kind, segment, decoder)


def test_a_clip_of_an_hour_costs_its_index_and_key_frames(long_film: Path) -> None:
    path, size = str(long_film), long_film.stat().st_size
    index = read_index(path)
    header = sum(end - begin for begin, end in index.ranges)
    assert size > 20e6 and header < size / 20
    rng = np.random.default_rng(1)
    for start in rng.integers(0, FRAMES - 64, 6):
        video = LinkedVideo(path, index.span(None))
        with open_video(video, "pyav") as reader:
            assert reader.num_frames == FRAMES
            assert numbers_of(reader.frames(np.arange(start, start + 64, 4))) == list(range(start, start + 64, 4))
        # The clip's 64 frames lie in at most three runs of 50; blocks and reading ahead take some more.
        assert video.fetched < header + 4 * size * 150 / FRAMES + 8 * BLOCK
    start = int(rng.integers(0, 1700))
    video = LinkedVideo(path, index.span(Segment(start, start + 10)))
    video.prefetch()
    before = video.fetched
    with open_video(video, "pyav") as reader:
        assert numbers_of(reader.frames([0, 50, 99])) == [10 * start, 10 * start + 50, 10 * start + 99]
    assert video.fetched == before, "all that it needs was read ahead"
    assert before < header + size * 200 / FRAMES + 8 * BLOCK


READ_SPREAD = """
import resource, sys
import numpy as np
from pretrain.data.decoders import open_video
from pretrain.data.linked_video import LinkedVideo, Span
from tests.films import numbers_of

def read(path, size, wanted):
    video = LinkedVideo(path, Span(size))
    with open_video(video, "pyav") as reader:
        assert numbers_of(reader.frames(wanted)) == list(wanted)
    return video.fetched

small, film, size, frames = sys.argv[1], sys.argv[2], int(sys.argv[4]), int(sys.argv[5])
read(small, int(sys.argv[3]), [0, 100])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert read(film, size, np.arange(50, frames, 3000)) > size
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_memory_of_a_film(long_film: Path, films: Callable[[str], Path]) -> None:
    """Without a promise all packets are listed, and frames of all parts are asked for; FFmpeg's memory counts."""
    small, size = films("end.mp4"), long_film.stat().st_size
    arguments = [small, long_film, small.stat().st_size, size, FRAMES]
    command = [sys.executable, "-c", READ_SPREAD, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout) < LIMIT + (4 << 20) < size - (4 << 20), (done.stdout, size)


def test_in_place_from_the_list_to_the_frames(films: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [(kind, start, end) for kind in ("end.mp4", "film.mkv", "stream.ts") for start, end in ((1, 3), (3, 3.4))]
    lines = [f"{films(kind)},{start},{end},{number}" for number, (kind, start, end) in enumerate(rows)]
    (tmp_path / "list.csv").write_text("\n".join(["path,start,end,label", *lines, f"{films('end.mp4')},50,60,9"]))
    out = str(tmp_path / "out")
    assert main(["--in-place", str(tmp_path / "list.csv"), out]) == 0
    index = load_index(out)
    assert index.samples == len(rows), "what begins behind the end is left out"
    for row in range(len(rows)):
        members = parse_sample(SampleReader([index], None, 10).read(0, 0, row))
        kind, start, end = rows[members.label]
        assert members.facts["segment"] == {"start": start, "end": end}
        with open_video(members.video(), "pyav", members.stamps) as reader:
            assert numbers_of(reader.frames(range(reader.num_frames))) == shown_in(kind, Segment(start, end))
    assert main(["--check", out, "--workers", "0", "--check-decoders", "pyav"]) == 0
    assert main(["--in-place", str(films("end.mp4")), str(tmp_path / "cut"), "--cut", "3.3"]) == 0
    assert load_index(str(tmp_path / "cut")).samples == 3


def test_a_large_file_is_read_by_ranges(
    films: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linked_shards, "FILM_BYTES", 1000)
    assert main(["--in-place", str(films("end.mp4")), str(tmp_path / "out")]) == 0
    members = parse_sample(SampleReader([load_index(str(tmp_path / "out"))], None, 10).read(0, 0, 0))
    assert isinstance(members.video(), LinkedVideo) and "segment" not in members.facts
    with open_video(members.video(), "pyav") as reader:
        assert reader.num_frames == 250 and numbers_of(reader.frames([200])) == [200]


def test_what_is_wrong_with_a_linked_file(films: Callable[[str], Path], tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    content = films("end.mp4").read_bytes()
    film.write_bytes(content)
    span = linked(str(films("end.mp4")), Segment(2, 4))

    def reason(content: bytes | None) -> str:
        film.unlink(missing_ok=True)
        if content is not None:
            film.write_bytes(content)
        with pytest.raises(SampleError) as caught:
            open_video(LinkedVideo(str(film), span, 0.5), "pyav").frames([0, 1])
        return caught.value.reason

    assert reason(None) == "missing"
    assert reason(content[:-1000]) == "changed"
    assert reason(bytes(len(content))) == "open"
    film.write_bytes(content + bytes(1000))
    with pytest.raises(SampleError, match=f"changed.*{len(content) + 1000} bytes now, {len(content)} when"):
        open_link(str(film), span.to_json(), 0.5)
    with pytest.raises(SampleError, match="missing"):
        open_link(str(tmp_path / "no.mp4"), span.to_json(), 0.5)
    with pytest.raises(SampleError, match="span"):
        Span.from_json(b'{"bytes": 3}')


def test_files_are_opened_once_and_none_stays_open(
    films: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, hidden = str(films("stream.ts")), str(films("edited.mp4"))
    (tmp_path / "cut.mp4").write_bytes(films("front.mp4").read_bytes()[:-20_000])
    (tmp_path / "sound.wav").write_bytes(sound_bytes(wave()))
    opened, closed = [], []
    whole, close = av.open, DecordReader.close

    def open_noted(*arguments: Any, **more: Any) -> Any:
        opened.append(whole(*arguments, **more))
        return opened[-1]

    monkeypatch.setattr(av, "open", open_noted)
    monkeypatch.setattr(DecordReader, "close", lambda reader: closed.append(reader) or close(reader))
    with open_video(LinkedVideo(path, Span(os.path.getsize(path), Segment(1, 2))), "pyav") as reader:
        assert len(opened) == 1 and reader.num_frames == 25
    for name, reason in (("cut.mp4", "decode"), ("sound.wav", "open")):
        content = (tmp_path / name).read_bytes()
        for video in (content, LinkedVideo(str(tmp_path / name), Span(len(content)))):
            with pytest.raises(SampleError, match=reason):
                open_video(video, "pyav")
    # decord counts the hidden frames as well.
    with pytest.raises(SampleError, match="decode"):
        open_video(LinkedVideo(hidden, Span(os.path.getsize(hidden), Segment(1, 2))), "decord")
    assert len(opened) == 6 and len(closed) == 1
    for container in opened:
        with pytest.raises(AssertionError, match="not open"):
            container.seek(0)


def test_a_store_that_fails_in_the_middle_is_no_bad_sample(
    films: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg takes a failed read for the file's end, or for damage; neither may become of an outage."""
    path = str(films("end.mp4"))
    whole, spans = storage.read_bytes, (linked(path, None), Span(os.path.getsize(path), Segment(1, 9)))
    total = -(-os.path.getsize(path) // BLOCK)
    outcomes = set()
    for allowed in range(total):
        left = [allowed]

        def read(*arguments: Any, left: list[int] = left, **more: Any) -> bytes:
            left[0] -= 1
            if left[0] < 0:
                raise storage.StorageError("no answer") from TimeoutError("no answer")
            return whole(*arguments, **more)

        monkeypatch.setattr(storage, "read_bytes", read)
        for span in spans:
            left[0] = allowed
            try:
                with open_video(LinkedVideo(path, span, 0.5), "pyav") as reader:
                    first = 25 if span.segment else 0
                    assert numbers_of(reader.frames([30, 190])) == [first + 30, first + 190]
                outcomes.add("frames")
            except DataError as error:
                outcomes.add("error")
                assert "no answer" in str(error)
    assert outcomes == {"frames", "error"}, "each of them occurs"


def test_reads_of_a_slow_store_share_a_deadline(films: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that decodes is watched: it must say that the store is slow before it is taken for hung."""
    whole, given = storage.read_bytes, []

    def read(url: str, begin: int, end: int, deadline_s: float, **more: Any) -> bytes:
        given.append(deadline_s)
        time.sleep(0.05)
        return whole(url, begin, end, **more)

    monkeypatch.setattr(storage, "read_bytes", read)
    path = str(films("end.mp4"))
    with open_video(LinkedVideo(path, Span(os.path.getsize(path)), 10.0), "pyav"):
        assert given[0] == 7.5 and len(given) > 3
        assert given == sorted(given, reverse=True) and given[-1] < 7.5 - 0.05 * (len(given) - 1) + 1e-3


class CountingProxy(FaultProxy):
    """Counts the bytes that the server's answers take."""

    served = 0

    def _copy(
        self, source: socket.socket, target: socket.socket, limit: int | None = None, flip: bool = False
    ) -> bool:
        with contextlib.suppress(OSError):
            from_server = source.getpeername()[1] == self._server_port
            while data := source.recv(1 << 16):
                target.sendall(data)
                self.served += len(data) if from_server else 0
            return True
        return False


def test_bytes_that_a_store_serves(
    long_film: Path, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "MISSING_S", 1.0)
    size = long_film.stat().st_size
    shutil.copy(long_film, s3_server.bucket / "film.mp4")
    proxy = CountingProxy(s3_server.port)
    fsspec.config.conf["s3"] = s3_server.options() | {"endpoint_url": f"http://127.0.0.1:{proxy.port}"}
    try:
        assert main(["--in-place", "s3://bucket/film.mp4", str(tmp_path / "out"), "--cut", "30"]) == 0
        assert proxy.served < size / 10, "indexing reads the container's index"
        index = load_index(str(tmp_path / "out"))
        assert index.samples == 60
        reader, before, clips = SampleReader([index], None, 30), proxy.served, 5
        fetched = 0
        for row in range(0, 60, 60 // clips):
            members = parse_sample(reader.read(0, 0, row))
            begin = round(10 * members.facts["segment"]["start"])
            video = members.video()
            assert isinstance(video, LinkedVideo)
            with open_video(video, "pyav") as frames:
                wanted = np.arange(100, 164, 4)
                assert numbers_of(frames.frames(wanted)) == (begin + wanted).tolist()
            fetched += video.fetched
        assert fetched <= proxy.served - before < fetched + 20_000 * clips, "heads of answers come on top"
        assert fetched < clips * size / 15
        storage.remove("s3://bucket/film.mp4")
        with pytest.raises(SampleError, match="missing"):
            reader.read(0, 0, 7)
    finally:
        proxy.close()


def test_a_store_that_is_gone_ends_the_run(films: Callable[[str], Path], s3_server: S3Server, tmp_path: Path) -> None:
    shutil.copy(films("end.mp4"), s3_server.bucket / "film.mp4")
    assert main(["--in-place", "s3://bucket/film.mp4", str(tmp_path / "out"), "--cut", "3"]) == 0
    reader = SampleReader([load_index(str(tmp_path / "out"))], None, 1)
    video = parse_sample(reader.read(0, 0, 0)).video()
    assert isinstance(video, LinkedVideo)
    unread = LinkedVideo(video.url, Span(video.span.size, Segment(1, 2)), 1)
    s3_server.stop()
    with open_video(video, "pyav") as frames:
        assert frames.frames([0, 20]).shape[0] == 2, "read ahead"
    for call in (lambda: reader.read(0, 0, 1), lambda: open_video(unread, "pyav")):
        began = time.monotonic()
        with pytest.raises(DataError, match="check the store"):
            call()
        assert time.monotonic() - began < 5, "one deadline for all reads of a file"
