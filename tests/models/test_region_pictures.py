"""Pictures of where a SparseFormer looks."""

import numpy as np
import pytest
import torch

from pretrain.models.sparseformer import Config
from pretrain.models.sparseformer.region_pictures import looks_of, region_rows, region_sheet, region_videos
from pretrain.models.sparseformer.sparseformer_model import SparseFormer
from pretrain.models.sparseformer.units import Looks


def build(video: bool) -> SparseFormer:
    torch.manual_seed(0)
    return SparseFormer(
        Config(size="custom", form="v1", tokens=4, focus_dim=64, dim=64, depth=1, repeats=2, points=9, channels=8,
               classes=3, video=video, replicates=2 if video else 1, drop_path=0.5)
    ).train()  # fmt: skip


def test_a_region_is_outlined_where_it_lies() -> None:
    """One token: its points in its region, both in one colour; nothing else changes."""
    region, points = torch.tensor([[[0.25, 0.5, 0.75, 1.0]]]), torch.tensor([[[[0.5, 0.75]]]])
    frames = np.zeros((1, 40, 80, 3), dtype=np.uint8)
    (drawn,) = region_videos(frames, Looks(regions=[region], points=[points]))
    coloured = np.argwhere(drawn[0].any(axis=-1))
    assert coloured.min(axis=0).tolist() == [20, 20] and coloured.max(axis=0).tolist() == [39, 60]
    assert drawn[0, 30, 40].any() and not drawn[0, 25, 40].any() and not frames.any()


def test_points_of_a_clip_are_drawn_at_their_time() -> None:
    region = torch.tensor([[[0.25, 0.25, 0.0, 0.75, 0.75, 0.5]]])
    points = torch.tensor([[[[0.5, 0.5, 0.3], [0.5, 0.5, 1.7]]]])
    frames = np.zeros((4, 40, 40, 3), dtype=np.uint8)
    (drawn,) = region_videos(frames, Looks(regions=[region], points=[points]))
    assert [bool(frame[20, 20].any()) for frame in drawn] == [False, True, False, True], "outside: the last frame"
    assert [bool(frame[10, 20].any()) for frame in drawn] == [True, True, False, False], "outlines in its half"


@pytest.mark.parametrize(("video", "frames"), [(False, 1), (True, 4)])
def test_sheets(video: bool, frames: int) -> None:
    model = build(video)
    pixels = torch.randint(256, (2, frames, 32, 48, 3), dtype=torch.uint8)
    state = torch.get_rng_state()
    looks = looks_of(model, pixels.float() / 255)
    assert len(looks.points) == 3 and model.training and torch.equal(state, torch.get_rng_state())
    sheet = region_sheet(pixels[1], looks, 1)
    # Enlarged sixfold: three looks beside each other, or in rows of four frames.
    height, width = (3 * (192 + 14), 4 * 290 + 2) if video else (192 + 14, 3 * 290 + 2)
    assert sheet.shape == (height, width, 3)
    rows = region_rows(pixels, looks)
    assert list(rows) == ["first look", "last look"]
    assert all(one.shape == pixels.shape and one.dtype == torch.uint8 for one in rows.values())
