"""Features of labelled samples as a pre-training run gives them by itself."""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.probe.features import Features
from pretrain.data.held_out import HeldOut
from pretrain.engine.health import lacking_features
from pretrain.errors import DataError, WeightsError
from pretrain.runtime.process_group import Ranks, gather_objects
from pretrain.trained.load_run import Trained

logger = logging.getLogger(__name__)


class LabelledFeatures(NamedTuple):
    """Features float32 [n, C] in the order of the shards, and the label of each."""

    values: Tensor
    labels: list[str]


def run_features(trained: Trained, train: str, held_out: str, micro: int, ranks: Ranks) -> tuple[Features, Features]:
    """Compute features of the training and held-out samples, equal on all ranks.

    Classes are those of the training samples, in alphabetical order, numbers by their size.

    Args:
        trained: the run.
        train, held_out: folders of shards, any fsspec URL.
        micro: samples of a forward pass.
        ranks: this process among all.

    Raises:
        WeightsError: the run's method gives no features, or has samples that can't be judged.
        DataError: shards can't be read, no sample has a label, or held-out samples are of classes that no training
            sample has.
    """
    if lacking := lacking_features(trained.method, trained.objective):
        raise WeightsError(f"{trained.source}: {lacking}; its encoder can be measured by evaluate.py --recipe")
    trained.objective.to(ranks.device)
    known, judged = (_labelled(trained, shards, micro, ranks) for shards in (train, held_out))
    names = sorted(set(known.labels), key=lambda name: (int(name) if name.isdecimal() else -1, name))
    if strange := sorted(set(judged.labels) - set(names)):
        raise DataError(
            f"{held_out}: {len(strange)} of its classes have no training sample in {train}: {', '.join(strange[:5])}; "
            "pack both from one set of classes"
        )
    return _numbered(known, names), _numbered(judged, names)


def _labelled(trained: Trained, shards: str, micro: int, ranks: Ranks) -> LabelledFeatures:
    samples = HeldOut(shards, shards, trained.method.samples(), ranks, micro, trained.recipe.data.deadline_s)
    positions: list[int] = []
    labels: list[str] = []
    values: list[Tensor] = []
    with torch.no_grad():
        for batch in samples.batches():
            values.append(trained.objective.features(batch.rows).float().cpu())
            positions += batch.numbers
            labels += batch.labels
    parts = [part for part in gather_objects(ranks, (positions, labels, values)) if part[0]]
    if not parts:
        raise DataError(f"{shards}: none of its samples can be read with a label; see the lines above")
    every = [position for part in parts for position in part[0]]
    # In the order of the shards: heads draw and shuffle rows by number, which must be the same for any ranks.
    order = sorted(range(len(every)), key=every.__getitem__)
    all_labels = [label for part in parts for label in part[1]]
    joined = torch.cat([one for part in parts for one in part[2]])
    return LabelledFeatures(joined[order], [all_labels[i] for i in order])


def _numbered(found: LabelledFeatures, names: list[str]) -> Features:
    number = {name: place for place, name in enumerate(names)}
    targets = torch.tensor([number[label] for label in found.labels])
    return Features([str(row) for row in range(len(targets))], found.values, targets, names)
