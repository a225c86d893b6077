"""Box files of every format, written as their makers write them."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

ACTIONS = ["Basketball", "Biking"]


def write(path: Path, content: Any) -> str:
    """Write text, bytes, or a pickle of anything else; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return str(path)


def act(videos: dict[str, int], size: tuple[int, int] = (240, 320)) -> dict[str, Any]:
    """Ground truth in ACT's form: a tube a video, from frame 2 to the last but one, a pixel a frame to the right."""
    tubes = {}
    for number, (video, frames) in enumerate(videos.items()):
        rows = [[frame, 10 + frame, 20, 60 + frame, 120] for frame in range(2, frames)]
        tubes[video] = {number % 2: [np.array(rows, np.float32)]}
    return {
        "labels": ACTIONS,
        "train_videos": [list(videos)[:1]],
        "test_videos": [list(videos)[1:]],
        "nframes": videos,
        "resolution": dict.fromkeys(videos, size),
        "gttubes": tubes,
    }


def python_2_pickle(video: bytes) -> bytes:
    """A pickle of Python 2, protocol 2: {video: array}, with texts as bytes and numpy's old module names."""
    table = np.array([[0.1, 0.2, 0.5, 0.6, 0.9]])
    data = table.tobytes()
    text = b"U" + bytes([len(video)]) + video
    return b"".join([
        b"\x80\x02}", text,
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
        b"(K\x01K\x01K\x05\x86cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R",
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
        b"\x89U", bytes([len(data)]), data, b"tb", b"s.",
    ])  # fmt: skip


def alphaction(size: tuple[int, int] = (640, 360)) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Annotations and detections: one person with two actions at second 902, nobody at 903."""
    images = [
        {"id": 10902 + second, "movie": "a", "timestamp": 902 + second, "width": size[0], "height": size[1]}
        for second in range(2)
    ]
    person = {"id": 10902003, "image_id": 10902, "category_id": 1, "action_ids": [12, 80], "person_id": 3,
              "bbox": [64.0, 36.0, 320.0, 180.0]}  # fmt: skip
    found = [{"image_id": 10903, "category_id": 1, "bbox": [0, 0, 64, 36], "score": score} for score in (0.95, 0.5)]
    return {"images": images, "annotations": [person]}, found


def as_json(content: Any) -> str:
    """JSON as the official tools write it."""
    return json.dumps(content)


def pyannot(video: str, frames: int = 6) -> dict[str, Any]:
    """Corrected annotations of one video: a tube from the second frame to the last but one."""
    boxes = np.array([[10, 20, 50, 100]] * (frames - 2), dtype=np.int16)
    tube = {"label": 1, "sf": 1, "ef": frames - 1, "boxes": boxes}
    return {video: {"label": 1, "numf": frames, "annotations": [tube]}}


