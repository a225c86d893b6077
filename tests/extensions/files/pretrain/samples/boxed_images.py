"""Pictures with boxes: any number of them in each."""

from dataclasses import dataclass

import numpy as np
import torch

from pretrain.data.decoders.crops import Box
from pretrain.data.decoders.image import decode_image
from pretrain.data.members import Members
from pretrain.data.samples import Arrays, Batch, Place, Sample, SourceInfo, made_up_samples
from pretrain.errors import SampleError
from pretrain.samples import image_pairs
from pretrain.samples.image_pairs import ImagePairs
from pretrain.samples.transforms import crop_resize


@dataclass
class Config(image_pairs.Config):
    """Pictures with boxes."""

    name: str = "boxed_images"
    """kind of sample: pretrain/samples/<name>.py"""
    views: int = 1
    """rows of each picture"""


class BoxedImages(ImagePairs):
    """`video` uint8 [B, 1, H, W, 3]; `boxes` float32 [sum of counts, 4], shares of the picture; `counts` int64 [B]."""

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        options, picture = self._options, decode_image(members.image())
        boxes = np.array(members.boxes(), dtype=np.float32).reshape(-1, 4)
        if not len(boxes):
            raise SampleError("boxes", f"{members.key}: an empty list of boxes")
        # The whole picture, squeezed: of a crop the boxes would have other shares.
        whole = Box(0, 0, picture.shape[2], picture.shape[1])
        return {"video": crop_resize(picture, whole, options.width, options.height)[None], "boxes": boxes}

    def collate(self, samples: list[Sample]) -> Batch:
        boxes = [sample.arrays.pop("boxes") for sample in samples]
        counts = torch.tensor([len(one) for one in boxes])
        return super().collate(samples) | {"boxes": torch.from_numpy(np.concatenate(boxes)), "counts": counts}

    def example(self, count: int) -> Batch:
        def arrays(place: Place) -> Arrays:
            pixels = np.zeros((1, *self._options.size, 3), np.uint8)
            return {"video": pixels, "boxes": np.tile(np.float32([0, 0, 1, 1]), (1 + place.position % 3, 1))}

        return self.collate(made_up_samples(count, arrays))
