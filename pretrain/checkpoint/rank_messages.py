"""Short messages between ranks out of background threads, where collectives are not safe.

They go through the key-value store at which the ranks met, not through files: a full disk must not silence the rank
that tells of it.
"""

import time

import torch.distributed as dist

from pretrain.errors import CheckpointError

#: Seconds between two looks, at first and at most. Many ranks ask one store.
SHORTEST_LOOK_S, LONGEST_LOOK_S = 0.02, 1.0


class RankMessages:
    """Messages by key, each written once, visible to all ranks that use the same `space`.

    Args:
        space: What keeps the keys of one run apart from those of another.
        store: Where they are; None: where the ranks met, or nowhere else where this is a single process.
    """

    def __init__(self, space: str, store: dist.Store | None = None) -> None:
        self._space = space
        if store is None:
            store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else dist.HashStore()
        self._store = store
        self.closed = False

    def post(self, key: str, text: str) -> None:
        """Leave a message."""
        self._store.set(f"{self._space}/{key}", text)

    def wait(self, key: str, timeout_s: float = float("inf")) -> str:
        """Wait for the message under `key` and return it.

        Raises:
            CheckpointError: it did not come in time, or the messages are closed.
        """
        full, deadline, pause = f"{self._space}/{key}", time.monotonic() + timeout_s, SHORTEST_LOOK_S
        # Looked for, not waited for in the store: nothing could end such a wait when the messages are closed.
        while not self._store.check([full]):
            if self.closed:
                raise CheckpointError(f"{key}: the run ended before it came")
            if time.monotonic() > deadline:
                raise CheckpointError(f"{key}: nothing from that rank within {timeout_s:.0f} s")
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_LOOK_S)
        return bytes(self._store.get(full)).decode()

    def take(self, key: str, timeout_s: float) -> str:
        """Wait as `wait` does, and remove the message."""
        text = self.wait(key, timeout_s)
        # Rank 0 serves the store: the messages of a run of weeks would all stay in its memory.
        self._store.delete_key(f"{self._space}/{key}")
        return text
