"""Random tiles of measured rasters, float32, any number of channels."""

from dataclasses import dataclass

import numpy as np

from pretrain.data.decoders.array import decode_array
from pretrain.data.members import Members
from pretrain.data.randomness import generator
from pretrain.data.samples import Arrays, Batch, Place, Sample, Samples, SourceInfo, index_columns, made_up_samples
from pretrain.recipe.schema import Input


@dataclass
class Config(Input):
    """Tiles."""

    name: str = "raster_tiles"
    """kind of sample: pretrain/samples/<name>.py"""
    side: int = 16
    """side of a tile, cells"""
    channels: tuple[int, int] = (1, 2)
    """channels of the first and of the second source"""


class RasterTiles(Samples):
    """`first` and `second` float32 [B, C, side, side]: channels differ, so the sources are not joined."""

    def __init__(self, options: Config, seed: int) -> None:
        self._options, self._seed = options, seed

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        raster, side = decode_array(members.array()), self._options.side
        draw = generator(self._seed, place.epoch, place.position, 0, "tile")
        y, x = (int(draw.integers(size - side + 1)) for size in raster.shape[1:])
        return {"tile": np.ascontiguousarray(raster[None, :, y : y + side, x : x + side])}

    def collate(self, samples: list[Sample]) -> Batch:
        apart = {number: [s for s in samples if s.place.source == number] for number in (0, 1)}
        tiles = {name: super(RasterTiles, self).collate(apart[n])["tile"] for n, name in enumerate(("first", "second"))}
        return tiles | index_columns(samples, views=1)

    def example(self, count: int) -> Batch:
        side = self._options.side

        def arrays(source: int) -> list[Sample]:
            size = (1, self._options.channels[source], side, side)
            made = made_up_samples(count, lambda place: {"tile": np.zeros(size, np.float32)})
            return [Sample(Place(0, s.place.position, source, 0, s.place.row), s.key, s.arrays) for s in made]

        return self.collate(arrays(0) + arrays(1))
