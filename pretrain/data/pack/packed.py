"""Outcomes of packing an item: a sample that is ready for its shard, or a line in the list of rejected ones."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Packed:
    """A sample that is ready.

    Attributes:
        files: local path of each member's content, by ending; they belong to the sample and are deleted with it.
        facts: its json.
        bytes_read: of the originals.
    """

    files: Mapping[str, str]
    facts: dict[str, Any]
    bytes_read: int

    def discard(self) -> None:
        """Delete the sample's files."""
        for path in self.files.values():
            os.unlink(path)


@dataclass(frozen=True)
class Rejected:
    """An item that is left out; `reason` is short and countable, `detail` says what was found."""

    name: str
    path: str
    reason: str
    detail: str
