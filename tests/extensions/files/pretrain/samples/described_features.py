"""Features of a film with a sentence."""

from dataclasses import dataclass

import numpy as np

from pretrain.data.decoders.array import decode_array
from pretrain.data.members import Members
from pretrain.data.samples import Arrays, Batch, Place, Samples, SourceInfo, made_up_samples
from pretrain.recipe.schema import Input


@dataclass
class Config(Input):
    """Features and bytes of a sentence."""

    name: str = "described_features"
    """kind of sample: pretrain/samples/<name>.py"""
    channels: int = 6
    """channels of a feature"""
    context: int = 12
    """bytes of a sentence"""


class DescribedFeatures(Samples):
    """`features` float32 [B, C], the mean over time, and `ids` int64 [B, context], 0 behind the end."""

    def __init__(self, options: Config) -> None:
        self._options = options

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        features = decode_array(members.array()).mean(0, dtype=np.float32)
        text = members.text().encode()[: self._options.context]
        ids = np.zeros(self._options.context, np.int64)
        ids[: len(text)] = list(text)
        return {"features": features[None], "ids": ids[None]}

    def example(self, count: int) -> Batch:
        features = np.zeros((1, self._options.channels), np.float32)
        ids = np.ones((1, self._options.context), np.int64)
        return self.collate(made_up_samples(count, lambda place: {"features": features, "ids": ids}))
