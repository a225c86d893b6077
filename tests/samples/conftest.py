"""Videos whose frames carry their number."""

from tests.numbered_videos import encode, frame_number  # noqa: F401  (fixtures)
