"""Few-shot evaluation: accuracy of the features with k labelled videos a class, mean and spread over draws."""

import numpy as np
import numpy.typing as npt
import torch

from finetune.probe.features import Features
from pretrain.data.randomness import generator
from pretrain.metrics.neighbours import knn_scores
from pretrain.metrics.ranking import accuracy


def draw_shots(targets: npt.NDArray[np.int64], shots: int, seed: int, draw: int) -> npt.NDArray[np.int64]:
    """Draw `shots` videos of every class (all where it has fewer): rows, a function of (seed, draw, class)."""
    rows = []
    for number in np.unique(targets):
        own = np.flatnonzero(targets == number)
        # A generator for each class: whoever is drawn of one does not depend on which others there are.
        rows.append(generator(seed, draw, int(number), "shots").permutation(own)[:shots])
    return np.sort(np.concatenate(rows))


def few_shot(train: Features, held_out: Features, shots: int, draws: int = 5, seed: int = 0) -> tuple[float, float]:
    """Measure the top-1 accuracy by nearest class mean: mean and standard deviation over draws, percent."""
    results = []
    for draw in range(draws):
        chosen = train.take(draw_shots(train.targets.numpy(), shots, seed, draw))
        means = class_means(chosen)
        scores = knn_scores(means.values, means.targets, held_out.values, len(train.names), neighbours=1)
        results.append(accuracy(scores, held_out.targets))
    return float(np.mean(results)), float(np.std(results, ddof=1)) if draws > 1 else 0.0


def class_means(features: Features) -> Features:
    """Average the unit-length features of each class' videos."""
    # A feature of zeros has no direction; divided by its length it would be NaN, and its class with it.
    unit = features.values / features.values.norm(dim=1, keepdim=True).clamp(min=1e-12)
    classes = features.targets.unique()
    values = [unit[features.targets == number].mean(0) for number in classes]
    return Features([str(int(number)) for number in classes], torch.stack(values), classes, features.names)
