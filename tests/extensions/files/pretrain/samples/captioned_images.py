"""Pictures with captions as token ids."""

from dataclasses import dataclass

import torch

from pretrain.data.members import Members
from pretrain.data.samples import Arrays, Batch, Place, SourceInfo
from pretrain.samples import image_pairs
from pretrain.samples.image_pairs import ImagePairs
from pretrain.samples.text import Tokenizer


@dataclass
class Config(image_pairs.Config):
    """Captioned pictures."""

    name: str = "captioned_images"
    """kind of sample: pretrain/samples/<name>.py"""
    views: int = 1
    """crops of each picture"""
    tokenizer: str = ""
    """file of the `tokenizers` package, or open_clip"""
    context: int = 8
    """token ids of a caption"""


class CaptionedImages(ImagePairs):
    """`video` uint8 [B, 1, H, W, 3] and `ids` int64 [B, context]."""

    def __init__(self, options: Config, seed: int) -> None:
        super().__init__(options, seed)
        self._tokenizer = Tokenizer(options.tokenizer, context=options.context, too_long="refuse")

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        ids = self._tokenizer.encode([members.text()]).ids
        return super().__call__(place, source, members) | {"ids": ids}

    def example(self, count: int) -> Batch:
        batch = super().example(count)
        ids = self._tokenizer.encode(["made up"] * len(batch["key"])).ids
        return batch | {"ids": torch.from_numpy(ids)}
