"""The files of one sample, by what they hold: its json is parsed once, whoever asks for parts of it."""

import functools
import io
import json
from collections.abc import Mapping
from typing import Any

from webdataset.tariterators import group_by_keys, tar_file_expander

from pretrain.data.fetch import RawSample
from pretrain.data.linked_video import LinkedVideo, VideoFile
from pretrain.data.media import VIDEO_ENDINGS
from pretrain.errors import SampleError


class Members:
    """Content of a sample's files.

    Args:
        files: content by ending, as webdataset splits names: what follows the first dot.
        key: of the sample, for messages.
        url: of its shard, for messages.
    """

    def __init__(self, files: Mapping[str, Any], key: str = "", url: str = "") -> None:
        self.files, self.key, self.url = files, key, url

    def video(self) -> VideoFile:
        """The video among them, for `open_video`: its bytes, or a linked film or segment, read as far as is needed.

        Raises:
            SampleError: "index" where there is none.
        """
        found: VideoFile = self._of_kind(VIDEO_ENDINGS, "video (.mp4 or another of {})")
        return found

    def _of_kind(self, endings: frozenset[str], name: str) -> Any:
        for ending, content in self.files.items():
            if ending.rsplit(".", 1)[-1] in endings:
                return content if isinstance(content, LinkedVideo) else bytes(content)
        there = [ending for ending in self.files if not ending.startswith("__")]
        raise SampleError("index", f"no {name.format(sorted(endings))} among its members {there}")

    @functools.cached_property
    def _json(self) -> Any:
        """The json's content, or the error that reading it raised."""
        try:
            return json.loads(self.files.get("json", b"{}"))
        except ValueError as error:
            return error

    @property
    def facts(self) -> dict[str, Any]:
        """The sample's json; empty without one.

        Raises:
            SampleError: "label" where the json is damaged, or no object.
        """
        if isinstance(self._json, ValueError):
            raise SampleError("label", f"the sample's json is damaged: {self._json}") from self._json
        if not isinstance(self._json, dict):
            raise SampleError("label", f"the sample's json holds {type(self._json).__name__}, an object is allowed")
        return self._json

    @property
    def label(self) -> Any:
        """What the json says under `label`; None where it says nothing. Errors as for `facts`."""
        return self.facts.get("label")

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
        """Whole numbers of a part of the json; -1 for each of them where one is missing or something else."""
        try:
            section = self._json if part is None else self._json[part]
            found = [section[name] for name in names]
        except (KeyError, TypeError):
            found = [None]
        return found if all(type(number) is int for number in found) else [-1] * len(names)


def parse_sample(raw: RawSample) -> Members:
    """Members of a sample, with webdataset's own tar reading and grouping.

    Raises:
        SampleError: "index" where the bytes are not the one sample that the index promises.
    """
    try:
        files = tar_file_expander([{"url": raw.url, "stream": io.BytesIO(raw.data)}])
        found: list[dict[str, Any]] = list(group_by_keys(files))
    except Exception as error:  # tarfile and webdataset raise many kinds; all mean that these bytes are no sample
        raise SampleError("index", f"{raw.url}: the range of {raw.key} is no tar member: {error.args[0]}") from error
    keys = [sample["__key__"] for sample in found]
    if keys != [raw.key]:
        raise SampleError("index", f"{raw.url}: {raw.key} promised by the index, {keys} found; index the shard again")
    return Members({**found[0], **raw.linked}, raw.key, raw.url)
