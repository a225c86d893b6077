"""Held-out shards of a recipe's sources, and what is said of samples in them that can't be read."""

import logging
from collections.abc import Sequence

from finetune.recipe import TuneRecipe
from pretrain.data.held_out import HeldOutSet, Unreadable
from pretrain.data.index import load_index
from pretrain.errors import DataError

logger = logging.getLogger(__name__)

#: Unreadable samples that a message lists.
SHOWN_UNREADABLE = 5


def held_out_sets(recipe: TuneRecipe, test: bool) -> list[HeldOutSet]:
    """Open the validation or test shards of the sources that have some.

    Raises:
        DataError: shards are not there.
    """
    found = []
    for name, source in recipe.data.sources.items():
        shards = (source.test or source.val) if test else source.val
        if shards:
            found.append(HeldOutSet(name, load_index(shards), source))
    return found


def report_unreadable(unreadable: Sequence[Unreadable | str], judged: int, recipe: TuneRecipe, what: str) -> None:
    """Say which of all ranks' held-out samples are in no score; arguments as for `report_missing`.

    Raises:
        DataError: none could be read, or too few.
    """
    if not judged:
        raise DataError(f"evaluation: none of {len(unreadable)} {what} could be read: {_some(unreadable)}")
    report_missing(unreadable, judged, recipe, what)


def report_missing(unreadable: Sequence[Unreadable | str], judged: int, recipe: TuneRecipe, what: str) -> None:
    """Say which held-out samples, of one rank maybe, are in no score.

    Args:
        unreadable: what could not be read.
        judged: samples that could be read.
        recipe: the run; data.bad_rate is the most of them that may be missing.
        what: they are, for messages.

    Raises:
        DataError: too many are missing.
    """
    if not unreadable:
        return
    bad, every, some = len(unreadable), len(unreadable) + judged, _some(unreadable)
    # bad_minimum: of few samples a single bad one is already more than the rate.
    if bad >= recipe.data.bad_minimum and bad > recipe.data.bad_rate * every:
        raise DataError(
            f"evaluation: {bad} of {every} {what} can't be read, more than data.bad_rate={recipe.data.bad_rate:g}: "
            f"{some}"
        )
    logger.warning("evaluation: %d of %d %s can't be read and are in no score: %s", bad, every, what, some)


def _some(unreadable: Sequence[Unreadable | str]) -> str:
    return "; ".join(map(str, unreadable[:SHOWN_UNREADABLE]))
