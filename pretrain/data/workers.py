"""How many data workers a rank has where the recipe leaves it open."""

from pretrain.recipe.schema import Data


def data_workers(data: Data, cores: int, room: int | None = None) -> int:
    """Count the data workers of a rank: the recipe's number, else one for each core that falls to the rank.

    Not fewer, where a plan says that fewer would do: what a sample costs to decode is known only of shards as pack.py
    makes them, others take up to four times as long (docs/performance.md), and a worker with nothing to do costs memory
    alone. Order and content of the batches don't depend on it.

    Args:
        data: The recipe's section.
        cores: For this rank.
        room: Workers whose micro-batches find room in shared memory; None: not known.
    """
    if data.workers is not None:
        return data.workers
    return max(1, cores if room is None else min(cores, room))
