"""What features are worth: neighbours, few-shot means, heads, retrieval."""

import argparse
import logging
from collections.abc import Mapping
from typing import Any

import torch

from finetune.probe.features import Features
from finetune.probe.few_shot import few_shot
from finetune.probe.heads import train_heads
from pretrain.metrics.collapse import effective_rank, feature_deviation
from pretrain.metrics.neighbours import knn_scores
from pretrain.metrics.ranking import accuracies
from pretrain.metrics.retrieval import RetrievalScores, cosine_ranks, scores_of_ranks

logger = logging.getLogger(__name__)

#: R@k of retrieval, as published for videos that find those of their own class.
RETRIEVED = (1, 5, 10, 20, 50)
#: Features whose effective rank is taken; more change it little (RankMe, section 3).
RANKED = 25_600


def scores(
    train: Features, held_out: Features, arguments: argparse.Namespace, seed: int, device: torch.device | None
) -> dict[str, Any]:
    """Measure held-out features by what is known of the training ones.

    Args:
        train: to learn from, or among which is looked.
        held_out: to measure on.
        arguments: `method` (knn, few-shot, retrieval, linear, attentive), `shots`, `epochs`.
        seed: of draws, heads and their order.
        device: where heads are trained.
    """
    result: dict[str, Any] = {"videos": len(held_out.keys), "chance": 100 / len(train.names)}
    if arguments.method == "knn":
        votes = knn_scores(train.values, train.targets, held_out.values, len(train.names))
        found = accuracies(votes, held_out.targets)
        result |= found
        logger.info("20 nearest neighbours: %s", told(found))
    elif arguments.method == "few-shot":
        for shots in arguments.shots:
            mean, spread = few_shot(train, held_out, shots, seed=seed)
            result[f"{shots} a class"] = {"top1": mean, "deviation": spread}
            logger.info("%d a class: top1 %.2f +- %.2f", shots, mean, spread)
    elif arguments.method == "retrieval":
        found = retrieved(train, held_out).named()
        result |= found
        logger.info("%s", told(found))
    else:
        points = train_heads(train, held_out, arguments.method, arguments.epochs, seed=seed, device=device)
        result["grid"] = [{"rate": point.rate, "decay": point.decay} | point.accuracies for point in points]
        result |= points[0].accuracies
        for point in points:
            logger.info("lr %.0e, wd %.0e: %s", point.rate, point.decay, told(point.accuracies))
    return result


def told(found: Mapping[str, float]) -> str:
    """Format numbers with their names."""
    return ", ".join(f"{name} {value:.2f}" for name, value in found.items())


def retrieved(train: Features, held_out: Features) -> RetrievalScores:
    """Look for each held-out sample's class among the training samples that are most similar to it, by cosine."""
    ranks = cosine_ranks(held_out.values, train.values, held_out.targets, train.targets)
    return scores_of_ranks(ranks, len(train.keys), RETRIEVED)


def spread(features: Features) -> dict[str, float]:
    """Say how many directions pooled features use, and how evenly: signs of collapse that need no labels."""
    # Spread over all of them: shards may be sorted by class.
    some = features.values[:: max(1, len(features.values) // RANKED)]
    found = {"effective_rank": float(effective_rank(some)), "deviation": float(feature_deviation(some))}
    logger.info("effective rank %.1f of %d, deviation %.3f (evenly spread: 1)", found["effective_rank"],
                some.shape[1], found["deviation"])  # fmt: skip
    return found
