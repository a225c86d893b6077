"""Frame indices, crops and test views equal the official code's (systems/videomae.md sections 6, 8, 9)."""

from typing import Any

import numpy as np

from pretrain.samples import sampling, transforms

KINDS = ("videomae_sampling",)


def test_pretraining_frames(case: Any) -> None:
    for e in case.meta["pretrain"]:
        n, frames, stride = e["num_frames"], e["clip_len"], e["stride"]
        assert sampling.clip_starts(n, frames, stride) == e["num_valid_offsets"], e
        assert sampling.clip_frames(n, frames, stride, e["offset_zero_based"]).tolist() == e["frames"], e


def test_dense_frames(case: Any) -> None:
    for e in case.meta["finetune_dense"]:
        n, frames, stride = e["num_frames"], e["clip_len"], e["stride"]
        assert sampling.dense_frames(n, frames, stride, e["end_index"]).tolist() == e["frames"], e
        if e["mode"] == "validation":
            assert sampling.dense_end(n, frames, stride) == e["end_index"], e


def test_dense_test_views(case: Any) -> None:
    for e in case.meta["test_dense"]:
        views = sampling.dense_views(e["num_frames"], e["clip_len"], e["stride"], e["num_clips"])
        assert views.tolist() == e["views"], e


def test_sparse_training_frames(case: Any) -> None:
    for e in case.meta["sparse_train"]:
        length = sampling.sparse_segment(e["num_frames"], e["num_segments"])
        drawn = np.random.RandomState(e["numpy_seed"]).randint(length, size=e["num_segments"]) if length else 0
        frames = e["first_index"] + sampling.sparse_frames(e["num_frames"], e["num_segments"], drawn)
        assert frames.tolist() == e["frames"], e


def test_sparse_validation_frames(case: Any) -> None:
    for e in case.meta["sparse_val"]:
        middle = sampling.sparse_segment(e["num_frames"], e["num_segments"]) // 2
        frames = e["first_index"] + sampling.sparse_frames(e["num_frames"], e["num_segments"], middle)
        assert frames.tolist() == e["frames"], e


def test_sparse_test_views(case: Any) -> None:
    for e in case.meta["sparse_test"]:
        views = e["first_index"] + sampling.sparse_views(e["num_frames"], e["num_segments"], len(e["views"]))
        assert views.tolist() == e["views"], e
        assert sorted(views.reshape(-1).tolist()) == e["frames"], e


def test_multiscale_crops(case: Any) -> None:
    for e in case.meta["multiscale_crop"]:
        sizes = transforms.crop_sizes(e["image_w"], e["image_h"], e["out_size"], e["out_size"])
        assert [list(size) for size in sizes] == e["crop_pairs_wh"], e
        offsets = transforms.crop_offsets(e["image_w"], e["image_h"], *sizes[-1])
        assert [list(offset) for offset in offsets] == e["offsets_for_last_pair"], e


def test_spatial_test_views(case: Any) -> None:
    for e in case.meta["test_spatial"]:
        found = transforms.spatial_starts(e["w"], e["h"], e["short_side"], e["num_crops"])
        assert found == (e["axis"], e["starts"]), e
