"""Videos whose frames carry their number."""

from tests.films import encode, frame_number  # noqa: F401  (fixtures)
