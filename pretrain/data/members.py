"""The files of one sample, found by what they hold; its json is parsed once, whoever asks for parts of it."""

import functools
import io
from collections.abc import Mapping
from typing import Any

from pretrain.data.fetch import RawSample
from pretrain.data.linked_video import Footage, LinkedVideo, StillImage, VideoFile
from pretrain.data.media import (
    ENDINGS,
    LABEL_ENDING,
    SOUND_ENDINGS,
    TEXT_ENDINGS,
    VIDEO_ENDINGS,
    endings_of,
    main_member,
)
from pretrain.data.motion_tables import MOTION_ENDING, Curve, parse_curve
from pretrain.errors import SampleError
from pretrain.runtime.untrusted import SAMPLE_JSON_BYTES, parse_json

#: Where the json of foreign shards and of manifests keeps a text, in this order.
TEXT_FACTS = ("caption", "text")


class Members:
    """Content of a sample's files.

    A sample may hold several files of a kind, told apart by what stands before the last dot of their endings: the
    member `<key>.flow.npy` is the array named "flow". Without a name the sample's own is meant: the one that its json
    calls `member`, else one without a name, else the first.

    Args:
        files: content by ending, as webdataset splits names: what follows the first dot.
        key: of the sample, for messages.
        url: of its shard, for messages.
        motion: its motion curve from the table beside the shard, where it was read.
    """

    def __init__(
        self, files: Mapping[str, Any], key: str = "", url: str = "", motion: Curve | None = None
    ) -> None:
        self.files, self.key, self.url = files, key, url
        self._motion = motion

    def video(self, name: str = "") -> VideoFile:
        """Return the video among them, for `open_video`: its bytes, or a linked film or segment, read as far as needed.

        Raises:
            SampleError: "index" where there is none.
        """
        found: VideoFile = self._of_kind(VIDEO_ENDINGS, "video (.mp4 or another of {})", name)
        return found

    def footage(self, name: str = "") -> Footage:
        """Return what clips are cut from, for `open_video`: the video, or else the image, a video of one frame.

        Raises:
            SampleError: "index" where there is neither.
        """
        if self._find(endings_of("image"), name) and not self._find(VIDEO_ENDINGS, name):
            return StillImage(self.image(name))
        return self.video(name)

    def image(self, name: str = "") -> bytes:
        """Return the image among them, for `decoders.image`. Errors as for `video`."""
        return self._of_kind(endings_of("image"), "image (.jpg or another of {})", name)

    def sound(self, name: str = "") -> VideoFile:
        """Return the sound among them, for `decoders.sound`: a sound file, or else the video, whose sound is meant.

        Of a linked film or segment it is read as far as is needed.

        Raises:
            SampleError: "index" where there is neither.
        """
        wanted = SOUND_ENDINGS if self._find(SOUND_ENDINGS, name) else SOUND_ENDINGS | VIDEO_ENDINGS
        found: VideoFile = self._of_kind(wanted, "sound (.wav or another of {})", name)
        return found

    def array(self, name: str = "") -> bytes:
        """Return the file of arrays among them, for `decoders.array`. Errors as for `video`."""
        return self._of_kind(ENDINGS["array"], "array (.npy or another of {})", name)

    def raster(self, name: str = "") -> bytes:
        """Return the GeoTIFF among them, for `decoders.geotiff`. Errors as for `video`."""
        return self._of_kind(ENDINGS["raster"], "raster ({})", name)

    def text(self, name: str = "") -> str:
        """Return the text among them, or the first where there are several; see `texts`."""
        return self.texts(name)[0]

    def texts(self, name: str = "") -> list[str]:
        """Collect the sample's texts: of its text file, else of the member `<name>.json`, else what its json (or the
        `meta` in it) says under `name`; the last two may hold one text or a list of them.

        Args:
            name: which; without one the first text file, else "caption" or "text" in the other places.

        Raises:
            SampleError: "index" where there is none, "text" for one that is empty or no text in UTF-8.
        """
        ending = self._find(TEXT_ENDINGS, name)
        names = [name] if name else list(TEXT_FACTS)
        found = self._decoded(ending) if ending else self._stated(names, "text")
        if found is None:
            raise self._missing(f"text ({sorted(TEXT_ENDINGS)}, or {' or '.join(names)} in its json)")
        texts = [found] if isinstance(found, str) else found
        if not isinstance(texts, list) or not texts or not all(isinstance(one, str) and one.strip() for one in texts):
            raise SampleError("text", f"{ending or 'its json'} holds no text but {str(found)[:60]!r}")
        return texts

    @property
    def motion(self) -> Curve | None:
        """Raw motion between neighbouring frames of the video, float32 [M - 1]: of the member `motion.npy`, else of the
        table beside the shard; None without either.

        Raises:
            SampleError: "motion" for a damaged member.
        """
        return parse_curve(bytes(self.files[MOTION_ENDING])) if MOTION_ENDING in self.files else self._motion

    def boxes(self) -> Any:
        """Read the boxes: of the member `boxes.json`, else what the json (or the `meta` in it) says under `boxes`.

        Raises:
            SampleError: "index" where there are none, "boxes" where their json is damaged.
        """
        stated = self._stated(["boxes"], "boxes")
        if stated is None:
            raise self._missing("boxes (boxes.json, or `boxes` in its json)")
        return stated

    def stated(self, name: str, reason: str) -> Any:
        """Read what a kind of sample needs beside the usual: of the member `<name>.json`, else what the json, or the
        `meta` in it, says under that name; None without.

        Raises:
            SampleError: `reason` where the json is damaged.
        """
        return self._stated([name], reason)

    def _of_kind(self, endings: frozenset[str], what: str, name: str) -> Any:
        ending = self._find(endings, name)
        if ending is None:
            raise self._missing(what.format(sorted(endings)) + (f" named {name!r}" if name else ""))
        content = self.files[ending]
        return content if isinstance(content, LinkedVideo) else bytes(content)

    def _find(self, endings: frozenset[str], name: str) -> str | None:
        """Find the ending of a member of a kind, and of a name if one is given; None where there is none."""
        parts = {ending: ending.rpartition(".") for ending in self.files}
        found = [ending for ending, (first, _, last) in parts.items() if last in endings and name in ("", first)]
        stated = self._json.get("member") if isinstance(self._json, dict) else None
        return main_member(found, stated)

    def _missing(self, what: str) -> SampleError:
        there = [ending for ending in self.files if not ending.startswith("__")]
        return SampleError("index", f"no {what} among its members {there}")

    def _decoded(self, ending: str) -> str:
        try:
            # -sig: a byte order mark, with which some editors begin a file, would else be part of the caption.
            return bytes(self.files[ending]).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SampleError("text", f"{ending} is not in UTF-8 ({error})") from error

    def _stated(self, names: list[str], reason: str) -> Any:
        """Read a member `<name>.json`, else what the json, or the `meta` in it, says under the first of some names
        that is there; None without."""
        for name in names:
            if f"{name}.json" in self.files:
                try:
                    content = parse_json(self.files[f"{name}.json"], SAMPLE_JSON_BYTES)
                except ValueError as error:
                    raise SampleError(reason, f"{name}.json is damaged: {error}") from error
                if content is None:
                    raise SampleError(reason, f"{name}.json holds null")
                return content
        facts = self._object(reason)
        meta = facts.get("meta")
        for section in (facts, meta if isinstance(meta, dict) else {}):
            for name in names:
                if section.get(name) is not None:
                    return section[name]
        return None

    @functools.cached_property
    def _json(self) -> Any:
        """The json's content, or the error that reading it raised."""
        try:
            # The error is kept and not raised: whoever needs pixels only must not lose the sample to a damaged json.
            return parse_json(self.files.get("json", b"{}"), SAMPLE_JSON_BYTES)
        except ValueError as error:
            return error

    @property
    def facts(self) -> dict[str, Any]:
        """The sample's json; empty without one.

        Raises:
            SampleError: "label" where the json is damaged, or no object.
        """
        return self._object("label")

    def _object(self, reason: str) -> dict[str, Any]:
        """Return the sample's json, for what `reason` names."""
        if isinstance(self._json, ValueError):
            raise SampleError(reason, f"the sample's json is damaged: {self._json}") from self._json
        if not isinstance(self._json, dict):
            raise SampleError(reason, f"the sample's json holds {type(self._json).__name__}, an object is allowed")
        return self._json

    @property
    def label(self) -> Any:
        """The label: of the json, else of the member `cls`; a number, or text. None without either.

        Errors as for `facts`.
        """
        label = self.facts.get("label")
        if label is not None or LABEL_ENDING not in self.files:
            return label
        try:
            text = bytes(self.files[LABEL_ENDING]).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            # With a stand-in for what is wrong, several classes would become one.
            raise SampleError("label", f"its {LABEL_ENDING} is not in UTF-8 ({error})") from error
        # Not isdigit, which takes a superscript for a digit: int() then raises.
        return int(text) if text.removeprefix("-").isdecimal() else text

    @property
    def grid(self) -> tuple[int, int]:
        """Step and phase of the video's grid of reference frames, as packing wrote them; (1, 0) where it has none.

        Anything else under that name in the json of foreign shards is no grid.
        """
        step, phase = self._numbers("grid", "step", "phase")
        return (step, phase) if step > 0 <= phase else (1, 0)

    @property
    def stamps(self) -> range | None:
        """Time stamps of the video's frames, as packing found them to be evenly spaced; None where it did not."""
        first, step = self._numbers("stamps", "first", "step")
        (frames,) = self._numbers(None, "frames")
        if step <= 0 or frames <= 0 or abs(first) + frames * step >= 1 << 62:  # FFmpeg's time stamps have 64 bits
            return None
        return range(first, first + frames * step, step)

    def _numbers(self, part: str | None, *names: str) -> list[int]:
        """Read whole numbers of a part of the json; -1 for each of them where one is missing or something else."""
        try:
            section = self._json if part is None else self._json[part]
            found = [section[name] for name in names]
        except (KeyError, TypeError):
            found = [None]
        # Not isinstance: a json's true would pass for 1.
        return found if all(type(number) is int for number in found) else [-1] * len(names)


def parse_sample(raw: RawSample) -> Members:
    """Split a sample into its members, with webdataset's own tar reading and grouping.

    Raises:
        SampleError: "index" where the bytes are not the one sample that the index promises.
    """
    # Here, because every dry run reaches this module, and webdataset costs it a second.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        files = tar_file_expander([{"url": raw.url, "stream": io.BytesIO(raw.data)}])
        found: list[dict[str, Any]] = list(group_by_keys(files))
    except Exception as error:  # tarfile and webdataset raise many kinds; all mean that these bytes are no sample
        raise SampleError("index", f"{raw.url}: the range of {raw.key} is no tar member: {error.args[0]}") from error
    keys = [sample["__key__"] for sample in found]
    if keys != [raw.key]:
        raise SampleError("index", f"{raw.url}: {raw.key} promised by the index, {keys} found; index the shard again")
    return Members({**found[0], **raw.linked}, raw.key, raw.url, raw.motion)
