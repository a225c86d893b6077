"""Pictures with a caption, and with tags that were parsed from it: timm's transforms, token ids, numbers of tags.

systems/tagalign.md, sections 4 to 6. Captions lie beside the pictures (pack.py --kind image --with txt), tags in a
folder of launch/tag.py.
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from pretrain.data.decoders.image import decode_image
from pretrain.data.index import Shard
from pretrain.data.members import Members
from pretrain.data.randomness import generator
from pretrain.data.samples import Arrays, Batch, Place, Sample, Samples, SourceInfo, draws, made_up_samples, stacked
from pretrain.data.tags.captions import usable_caption
from pretrain.data.tags.tag_folder import TagTable, list_hash, read_table, read_tags
from pretrain.errors import DataError, SampleError
from pretrain.samples import picture
from pretrain.samples.picture_transforms import evaluated_picture
from pretrain.samples.pixel_augment import PixelAugment
from pretrain.samples.text import CLIP, Tokenizer

#: In a row of tags: none.
NO_TAG = -1
#: Tables of tags that a worker keeps, each of one shard; of 10,000 samples one takes about 200 kB.
KEPT_TABLES = 256


@dataclass
class Config(picture.Config):
    """Pictures with captions and tags."""

    name: str = "captioned"
    """kind of sample: pretrain/samples/<name>.py"""
    flip: bool = True
    """mirror half of the pictures; "left" and "right" in captions then lie"""
    augment: PixelAugment = field(default_factory=lambda: PixelAugment(randaugment="rand-m9-mstd0.5-inc1"))
    """augmentations of pixels"""
    caption: str = ""
    """name of the caption among a sample's texts; empty: the first text file, else `caption` or `text` of its json"""
    tokenizer: str = CLIP
    """clip, or a tokenizer.json (any URL); has to be the text tower's"""
    context: int = 77
    """token ids of a caption with start and end"""
    too_long: Literal["cut", "refuse"] = "cut"
    """captions with more tokens: cut drops what is beyond (the share of such captions is logged), refuse replaces the
    sample"""
    tags: str | None = None
    """folder of launch/tag.py (any URL) with the tags of these pictures; null: none are read"""
    tag_count: int = 10000
    """tags in that folder's list"""
    untagged: Literal["replace", "keep"] = "replace"
    """pictures without a tag: replace counts them and takes others (published: they are removed), keep trains on the
    caption alone; their share is logged"""

    def problems(self) -> list[str]:
        """Say what in this section can't work."""
        found = super().problems()
        found += [
            f"input.{name}: found {getattr(self, name)}, allowed: more than 0"
            for name in ("context", "tag_count")
            if getattr(self, name) <= 0
        ]
        return found

    def describe(self) -> list[tuple[str, str, str]]:
        """Say what a picture is."""
        tags = "none" if self.tags is None else f"of {self.tag_count:,}"
        caption = ("caption", f"{self.context} tokens", self.tokenizer)
        return [*super().describe(), caption, ("tags", tags, f"pictures without: {self.untagged}")]


class CaptionedPictures(Samples):
    """A batch holds `video` uint8 [B, 1, H, W, 3], `ids` int64 [B, context], `cut` int64 [B], how many tokens were
    dropped, and with tags `tags` int64 [B, most], each row's numbers and then -1.

    Args:
        options: the recipe's input section.
        seed: the recipe's run.seed.
    """

    def __init__(self, options: Config, seed: int) -> None:
        self._options, self._seed = options, seed
        self._tokenizer = Tokenizer(options.tokenizer, options.context, too_long=options.too_long)

    @property
    def vocabulary(self) -> int:
        """Ids of the tokenizer."""
        return self._tokenizer.vocabulary

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        options = self._options
        # Before the picture is decoded: many samples end here.
        tags = None if options.tags is None else self._tags(source.shards[place.shard], place.row)
        encoded = self._tokenizer.encode([usable_caption(members.text(options.caption))])
        clip = decode_image(members.image())
        views = [
            options.training_view(clip, options.augment, options.flip, draw)
            for draw in draws(self._seed, place, options.views)
        ]
        repeated = {"ids": encoded.ids, "cut": encoded.cut} | ({} if tags is None else {"tags": tags[None]})
        return {"video": stacked(views)} | {
            name: np.repeat(array, options.views, axis=0) for name, array in repeated.items()
        }

    def without_chance(self, source: SourceInfo, members: Members) -> Arrays:
        """Cut the middle out of the picture, `video` [1, 1, H, W, 3]."""
        options = self._options
        clip = decode_image(members.image())
        view = evaluated_picture(clip[0], options.height, options.evaluated_side, options.evaluated_filter)
        return {"video": view[None, None]}

    def collate(self, samples: list[Sample]) -> Batch:
        if "tags" not in samples[0].arrays:
            return super().collate(samples)
        most = max(1, *(sample.arrays["tags"].shape[1] for sample in samples))
        filled = [one.arrays | {"tags": _filled(one.arrays["tags"], most)} for one in samples]
        return super().collate(
            [dataclasses.replace(one, arrays=arrays) for one, arrays in zip(samples, filled, strict=True)]
        )

    def example(self, count: int) -> Batch:
        options = self._options
        ids = self._tokenizer.encode(["a made up caption"]).ids

        def arrays(place: Place) -> Arrays:
            rng = generator("made-up picture", place.position)
            size = (options.views, *options.size, 3)
            found: Arrays = {"video": rng.integers(256, size=size, dtype=np.uint8)}
            found |= {"ids": np.repeat(ids, options.views, axis=0), "cut": np.zeros(options.views, np.int64)}
            if options.tags is not None:
                found["tags"] = rng.integers(options.tag_count, size=(options.views, 1 + place.position % 3))
            return found

        return self.collate(made_up_samples(count, arrays))

    def _tags(self, shard: Shard, row: int) -> npt.NDArray[np.int64]:
        options = self._options
        assert options.tags is not None
        table = _table(options.tags, shard, _hash_of_list(options.tags, options.tag_count))
        found = table.row(row).astype(np.int64)
        if not len(found) and options.untagged == "replace":
            raise SampleError("untagged", f"no tag of the list ({table.reasons[row]})")
        return found


@functools.lru_cache(maxsize=KEPT_TABLES)
def _table(folder: str, shard: Shard, tags_sha256: str) -> TagTable:
    return read_table(folder, shard, tags_sha256)


@functools.lru_cache(maxsize=8)
def _hash_of_list(folder: str, count: int) -> str:
    tags = read_tags(folder)
    if len(tags) != count:
        raise DataError(f"input.tag_count: found {count}, allowed: {len(tags)}, the tags in {folder}")
    return list_hash(tags)


def _filled(tags: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    return np.pad(tags, ((0, 0), (0, most - tags.shape[1])), constant_values=NO_TAG)
