"""The stream of a file that is its film, where there are several."""

from typing import Any


def films(container: Any) -> list[Any]:
    """List the video streams that are films: the cover picture of a song is none."""
    import av

    cover = av.stream.Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & cover]


def main_film(container: Any) -> Any | None:
    """Choose the film that players and all decoders show, None without one: FFmpeg's choice, whose default flag decides
    first, then frames and rate. The first stream may be a small preview.
    """
    found = films(container)
    if len(found) < 2:
        return found[0] if found else None
    best = container.streams.best("video")
    return best if best in found else found[0]
