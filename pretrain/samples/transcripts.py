"""Words of a narrated video with the times at which they are spoken, and their alignment with a better transcript.

Sources: systems/tvtsv2.md, section 5 (YT-Temporal's annotations; TencentARC/TVTS @ 290a63e, folder v2). Times are
seconds from the video's first frame.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.errors import DataError, SampleError

#: Half width of the alignment's band: this share of the words, at least so many.
RADIUS_SHARE, RADIUS_WORDS = 0.1, 32
#: Longest part of a word that edit distances look at: recognised speech has no longer ones.
LETTERS = 24

Costs = npt.NDArray[np.int32]
Times = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Transcript:
    """Spoken words in the order of their times.

    Attributes:
        words: text of each.
        times: of each, float64 [W].
    """

    words: tuple[str, ...]
    times: Times

    def between(self, start: float, end: float) -> str:
        """Join the words whose time lies between two times, both excluded; empty where nothing is said."""
        first, last = np.searchsorted(self.times, start, "right"), np.searchsorted(self.times, end, "left")
        return " ".join(self.words[first:last])


def parse_transcript(content: Any) -> Transcript:
    """Read a transcript.

    Args:
        content: YT-Temporal's annotation: `subtitles`, a list of {word, time}, and where there is one the `denoised`
            transcript, a list of {cleanasr}, whose words then take the times of those that they are aligned with. Or
            what speech recognisers write: `segments`, a list of {start, end, text}, whose words are spread evenly.

    Raises:
        SampleError: "narration" where it is none of these, or has no words.
    """
    try:
        if "segments" in content:
            words, times = _spread(content["segments"])
        else:
            words, times = _spoken(content["subtitles"])
            better = [word for part in content.get("denoised") or [] for word in repaired(part["cleanasr"].split())]
            if better and words:
                words, times = better, times[aligned(words, better)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SampleError(
            "narration",
            f"no transcript ({type(error).__name__}: {error}); allowed: subtitles, a list of word and time, and "
            "denoised, a list of cleanasr; or segments, a list of start, end and text",
        ) from error
    if not words or not np.isfinite(times).all():
        raise SampleError("narration", "a transcript without words" if not words else "a time that is no number")
    order = np.argsort(times, kind="stable")
    return Transcript(tuple(words[place] for place in order), times[order])


def _spoken(entries: Sequence[Any]) -> tuple[list[str], Times]:
    kept = [(word, entry["time"]) for entry in entries for word in repaired([entry["word"]])]
    return [word for word, _ in kept], np.array([float(time) for _, time in kept])


def _spread(segments: Sequence[Any]) -> tuple[list[str], Times]:
    words: list[str] = []
    times: list[float] = []
    for segment in segments:
        own, start, end = repaired(segment["text"].split()), float(segment["start"]), float(segment["end"])
        words += own
        # Centres: at its very start or end a word would lie on the border of two segments.
        times += [start + (end - start) * (place + 0.5) / len(own) for place in range(len(own))]
    return words, np.array(times)


def repaired(words: Sequence[str]) -> list[str]:
    """Mend what was decoded wrongly (ftfy), and leave out entities of HTML: words that begin with & or end with ;.

    Raises:
        DataError: ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise DataError("transcripts are repaired with ftfy; pip install 'tubelet[language]'") from error
    kept = (word for word in words if not word.startswith("&") and not word.endswith(";"))
    return [fixed for word in kept if (fixed := ftfy.fix_text(word).strip())]


def aligned(spoken: Sequence[str], better: Sequence[str]) -> npt.NDArray[np.int64]:
    """Find for each word of a better transcript the spoken word that it stands for: numbers, int64 [len(better)].

    Dynamic time warping on edit distances within a band around the diagonal; a word that the path gives several spoken
    ones takes the most similar, the first of equals.

    Args:
        spoken: recognised words, N.
        better: words of the other transcript, M; neither is empty.
    """
    distances, row_of, column_of = _distances(spoken, better)
    count, other = len(spoken), len(better)
    radius = max(math.ceil(max(count, other) * RADIUS_SHARE), RADIUS_WORDS)
    centres = np.arange(count) * other // count
    low, high = np.maximum(centres - radius, 0), np.minimum(centres + radius + 1, other)
    high[-1] = other  # the path ends in the corner
    came = _warp(distances, row_of, column_of, low, high)
    found, best = np.zeros(other, np.int64), np.full(other, np.iinfo(np.int32).max)
    row, column = count - 1, other - 1
    while row >= 0 and column >= 0:
        cost = distances[row_of[row], column_of[column]]
        # The path is walked from its end: of equals the one that comes later here is the first.
        if cost <= best[column]:
            found[column], best[column] = row, cost
        step = came[row][column - low[row]]
        row, column = row - (step != 2), column - (step != 1)
    return found


def _warp(
    distances: Costs, row_of: npt.NDArray[np.intp], column_of: npt.NDArray[np.intp], low: Any, high: Any
) -> list[npt.NDArray[np.int8]]:
    """Fill the table row by row; returns where each cell's path comes from: 0 diagonal, 1 above, 2 the left."""
    far = np.int64(1 << 40)
    above, above_low, came = np.zeros(0, np.int64), 0, []
    for row in range(len(row_of)):
        first, last = int(low[row]), int(high[row])
        costs = distances[row_of[row], column_of[first:last]].astype(np.int64)
        up, diagonal = np.full(last - first, far), np.full(last - first, far)
        for target, shift in ((up, 0), (diagonal, 1)):
            columns = np.arange(first, last) - shift
            inside = (columns >= above_low) & (columns < above_low + len(above))
            target[inside] = above[columns[inside] - above_low]
        if row == 0:
            diagonal[0] = 0
        entered = np.minimum(up, diagonal) + costs
        # D_j = min(entered_j, D_{j-1} + c_j), as a running minimum: with sums S of costs, D - S only ever falls.
        sums = np.cumsum(costs)
        total = sums + np.minimum.accumulate(entered - sums)
        step = np.where(diagonal <= up, 0, 1).astype(np.int8)
        step[total < entered] = 2
        came.append(step)
        above, above_low = total, first
    return came


def _distances(first: Sequence[str], second: Sequence[str]) -> tuple[Costs, Any, Any]:
    """Compute Levenshtein distances [words, words] of all pairs of different words, and where each word stands."""
    rows, row_of = np.unique(np.array(first), return_inverse=True)
    columns, column_of = np.unique(np.array(second), return_inverse=True)
    left, right = (np.array([list(word[:LETTERS].ljust(LETTERS, "\0")) for word in some]) for some in (rows, columns))
    sizes = np.array([min(len(word), LETTERS) for word in columns])
    longest = [max(min(len(word), LETTERS) for word in some) for some in (rows, columns)]
    # One row of Levenshtein's table for all pairs at once, [rows, columns, letters + 1].
    table = np.broadcast_to(np.arange(longest[1] + 1), (len(rows), len(columns), longest[1] + 1)).astype(np.int32)
    lengths = np.array([min(len(word), LETTERS) for word in rows])
    found = np.zeros((len(rows), len(columns)), np.int32)
    for letter in range(longest[0] + 1):
        done = lengths == letter
        found[done] = table[done][:, np.arange(len(sizes)), sizes]
        if letter < longest[0]:
            other = left[:, None, letter, None] != right[None, :, : longest[1]]
            fresh = np.minimum(table[..., 1:] + 1, table[..., :-1] + other)
            fresh = np.concatenate((np.full((*fresh.shape[:2], 1), letter + 1, np.int32), fresh), axis=2)
            steps = np.arange(longest[1] + 1)
            table = (np.minimum.accumulate(fresh - steps, axis=2) + steps).astype(np.int32)
    return found, row_of, column_of
