"""Tracks: boxes of successive keyframes that are one person, by overlap alone."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pretrain.metrics.overlap import iou_continuous

#: Boxes of two keyframes are one person from this overlap on.
LINKED = 0.3
#: Keyframes that a person may be missing from without becoming another one.
GAP = 2


def link_tracks(boxes: Sequence[npt.NDArray[np.float32]], linked: float = LINKED, gap: int = GAP) -> list[list[int]]:
    """Number the persons of a video.

    The pairs with the largest overlap are linked first; a box without a partner begins a track.

    Args:
        boxes: of each keyframe, shares [n, 4], in the order of time.
        linked: least overlap.
        gap: keyframes that a track may miss.

    Returns:
        for each keyframe the track of each of its boxes, counted from 0.
    """
    last: dict[int, tuple[int, npt.NDArray[np.float32]]] = {}
    numbered: list[list[int]] = []
    for time, found in enumerate(boxes):
        live = [track for track, (seen, _) in last.items() if time - seen <= gap + 1]
        mine = _partners(found, [last[track][1] for track in live], linked)
        tracks = [live[mine[row]] if row in mine else -1 for row in range(len(found))]
        for row in range(len(found)):
            if tracks[row] < 0:
                tracks[row] = len(last)
            last[tracks[row]] = time, found[row]
        numbered.append(tracks)
    return numbered


def _partners(
    found: npt.NDArray[np.float32], known: list[npt.NDArray[np.float32]], linked: float
) -> dict[int, int]:
    """Pair boxes [n, 4] with known ones: row of each paired box -> place among the known."""
    if not len(found) or not known:
        return {}
    overlaps = iou_continuous(found.astype(np.float64)[:, None], np.stack(known).astype(np.float64)[None])
    pairs: dict[int, int] = {}
    for flat in np.argsort(-overlaps, axis=None, kind="stable").tolist():
        row, place = divmod(flat, len(known))
        if overlaps[row, place] < linked:
            break
        if row not in pairs and place not in pairs.values():
            pairs[row] = place
    return pairs
