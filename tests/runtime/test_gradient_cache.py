"""Gradients by micro-batches against those of one graph over all of them, in this process."""

import pytest
import torch
from torch import Tensor, nn

from pretrain.errors import TrainingError
from pretrain.runtime.gradient_cache import GradientCache
from pretrain.runtime.seeds import seed_forward

PARTS, ROWS = 3, 4


class Model(nn.Module):
    """Dropout, batch norm, biases, a teacher without gradient, labels, and a temperature of the loss alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.4), nn.Linear(16, 5))
        self.teacher = nn.Linear(6, 5).requires_grad_(False)
        self.temperature = nn.Parameter(torch.tensor(0.4))

    def embed(self, rows: Tensor) -> dict[str, Tensor]:
        label = (rows[:, 0] > 0).long()
        return {"query": self.encoder(rows), "key": self.teacher(rows), "label": label}

    def compare(self, embeddings: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        query, key, label = embeddings["query"], embeddings["key"], embeddings["label"]
        dropped = nn.functional.dropout(query, 0.2, self.training)
        logits = dropped @ key.T / self.temperature
        same = (label[:, None] == label).to(logits.dtype)
        loss = -(logits.log_softmax(1) * same).sum(1).mean()
        return loss, {"accuracy": (logits.argmax(1) == torch.arange(len(query))).float().mean()}


def micro_batches() -> list[Tensor]:
    rows = torch.randn(PARTS * ROWS, 6, generator=torch.Generator().manual_seed(1))
    return list(rows.split(ROWS))


def step(model: Model, cache: GradientCache, number: int = 0, reseed: bool = True) -> list[float]:
    """Gradients of one step as the engine accumulates them; the loss of each micro-batch."""
    losses = []
    with cache.collecting(model):
        for part, rows in enumerate(micro_batches()):
            seed_forward(7, number, part, 0)
            cache(model.embed(rows), model.compare)
    for part, rows in enumerate(micro_batches()):
        if reseed:
            seed_forward(7, number, part, 0)
        loss, metrics = cache(model.embed(rows), model.compare)
        (loss / PARTS).backward()
        losses.append(float(loss.detach()))
        assert metrics.keys() == {"accuracy"} and not metrics["accuracy"].requires_grad
    return losses


def whole(model: Model, number: int = 0) -> float:
    """The same by one graph over all micro-batches."""
    parts = []
    for part, rows in enumerate(micro_batches()):
        seed_forward(7, number, part, 0)
        parts.append(model.embed(rows))
    loss, _ = model.compare({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    loss.backward()
    return float(loss.detach())


def test_gradients_are_those_of_one_graph_with_dropout_and_batch_norm() -> None:
    cached, direct, cache = Model(), Model(), GradientCache(PARTS)
    for number in range(2):
        cached.zero_grad(), direct.zero_grad()
        assert step(cached, cache, number) == pytest.approx([whole(direct, number)] * PARTS, abs=1e-6)
        expected = {name: value.grad for name, value in direct.named_parameters() if value.requires_grad}
        for name, value in cached.named_parameters():
            if name.startswith("teacher"):
                assert value.grad is None
            else:
                assert torch.allclose(value.grad, expected[name], rtol=1e-5, atol=1e-6), name
                assert float(expected[name].abs().max()) > 1e-4 or name == "encoder.0.bias", name
    for (name, value), right in zip(cached.named_buffers(), direct.buffers(), strict=True):
        assert torch.equal(value, right), f"{name}: taken in once a step"


def test_the_mean_of_micro_batch_losses_is_something_else() -> None:
    """What a step without cache would compute: fewer negatives, and another gradient."""
    cached, small = Model(), Model()
    step(cached, GradientCache(PARTS))
    for part, rows in enumerate(micro_batches()):
        seed_forward(7, 0, part, 0)
        (small.compare(small.embed(rows))[0] / PARTS).backward()
    assert not torch.allclose(cached.encoder[4].weight.grad, small.encoder[4].weight.grad, rtol=0.05)


def test_another_dropout_mask_in_the_second_pass_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"micro-batch 0 gave other values of 'query'.*Seed torch alike"):
        step(Model(), GradientCache(PARTS), reseed=False)


def test_wrong_numbers_of_micro_batches_are_refused() -> None:
    model, rows = Model(), micro_batches()[0]
    cache = GradientCache(PARTS)
    with pytest.raises(TrainingError, match="without its first pass"):
        cache(model.embed(rows), model.compare)
    with pytest.raises(TrainingError, match="found 1 micro-batches in the first pass, allowed: 3"):
        with cache.collecting(model):
            cache(model.embed(rows), model.compare)
    step(model, cache)
    with pytest.raises(TrainingError, match="without its first pass"):
        cache(model.embed(rows), model.compare)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_reach_the_loss_and_the_gradient(bad: float) -> None:
    """The step's guards look there."""
    model = Model()
    with torch.no_grad():
        model.encoder[4].bias[0] = bad
    losses = step(model, GradientCache(PARTS))
    assert not any(torch.tensor(losses).isfinite())
    assert not model.encoder[4].weight.grad.isfinite().all()


def test_micro_batches_of_float16_embeddings_keep_small_gradients() -> None:
    """1e-8 is 0 in float16, whose loss scale comes only with the second pass."""
    weight = torch.tensor([[0.5, -0.25]], requires_grad=True)
    rows = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [-1.0]])]
    cache = GradientCache(2)

    def compare(embeddings: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return embeddings["z"].float().sum() * 1e-8, {}

    with cache.collecting(nn.Identity()):
        for part in rows:
            cache({"z": (part @ weight).half()}, compare)
    for part in rows:
        loss, _ = cache({"z": (part @ weight).half()}, compare)
        (loss / 2 * 2**16).backward()
    assert torch.allclose(weight.grad / 2**16, torch.full((1, 2), 5e-8), rtol=1e-2)


def test_the_first_pass_keeps_no_activations() -> None:
    """A view of the tokens would keep them all; the cache holds copies of the embeddings alone."""
    tokens = torch.randn(2, 50, 8)
    cache = GradientCache(2)
    with cache.collecting(nn.Identity()):
        cache({"z": tokens[:, 0]}, lambda found: (found["z"].sum(), {}))
        assert cache._parts[0]["z"].untyped_storage().nbytes() == 2 * 8 * 4
        cache({"z": tokens[:, 0]}, lambda found: (found["z"].sum(), {}))
