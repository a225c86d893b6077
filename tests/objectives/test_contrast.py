"""Contrast beside torch's cross-entropy, written-out sums and itself: in pieces, over ranks, accumulated."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.errors import TrainingError
from pretrain.objectives.contrast import Form, LogitScale, both_directions, info_nce, normalized
from pretrain.runtime.process_group import Ranks

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
FORMS: tuple[Form, ...] = ("sum_of_logs", "log_of_sum")
B, N, D, K = 7, 23, 5, 3


def made(*shape: int, seed: int = 1, kind: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=kind)


@pytest.fixture
def inputs() -> dict[str, Any]:
    """Anchors, candidates, columns and weights; one weight is 0, one row has a soft positive twice."""
    order = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(row)) for row in range(B)])
    soft, weights = order[:, 1 : 1 + K].clone(), made(B, K, seed=3).sigmoid()
    soft[2, 1], weights[4, 0] = soft[2, 0], 0.0
    return {
        "anchors": normalized(made(B, D)),
        "candidates": normalized(made(N, D, seed=2)),
        "positives": order[:, 0],
        "temperature": 0.13,
        "soft": soft,
        "weights": weights,
        "excluded": made(B, N, seed=4) > 0.8,
    }


def written_out(form: Form, **given: Any) -> Tensor:
    """The formula of the specifications, one exponential after the other."""
    rows = []
    for row in range(B):
        allowed = {int(given["positives"][row]), *given["soft"][row].tolist()}
        used = [column for column in range(N) if column in allowed or not given["excluded"][row, column]]
        scores = given["candidates"] @ given["anchors"][row] / given["temperature"]
        share = scores.exp() / scores[used].exp().sum()
        own, others = share[given["positives"][row]], share[given["soft"][row]]
        weight = given["weights"][row]
        rows.append(-(own + (weight * others).sum()).log() if form == "log_of_sum" else
                    -own.log() - (weight * others.log()).sum())  # fmt: skip
    return torch.stack(rows)


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("form", FORMS)
def test_both_forms_are_those_of_the_specifications(inputs: dict[str, Any], form: Form, chunk: int | None) -> None:
    assert torch.allclose(info_nce(**inputs, form=form, chunk=chunk), written_out(form, **inputs), rtol=1e-10)


@pytest.mark.parametrize("chunk", [None, 3])
def test_without_soft_positives_it_is_cross_entropy(inputs: dict[str, Any], chunk: int | None) -> None:
    plain = {name: inputs[name] for name in ("anchors", "candidates", "positives", "temperature")}
    logits = inputs["anchors"] @ inputs["candidates"].T / 0.13
    expected = F.cross_entropy(logits, inputs["positives"], reduction="none")
    assert torch.allclose(info_nce(**plain, chunk=chunk), expected)
    hidden = logits.masked_fill(inputs["excluded"].scatter(1, inputs["positives"][:, None], False), -math.inf)
    found = info_nce(**plain, excluded=inputs["excluded"], chunk=chunk)
    assert torch.allclose(found, F.cross_entropy(hidden, inputs["positives"], reduction="none"))


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_none_and_of_all(inputs: dict[str, Any], form: Form) -> None:
    """0: plain InfoNCE. 1: as many positives, each with a term of its own, or all in one."""
    plain = info_nce(**inputs | {"soft": None, "weights": None, "excluded": None})
    zero, one = (inputs | {"excluded": None, "weights": torch.full((B, K), value)} for value in (0.0, 1.0))
    assert torch.allclose(info_nce(**zero, form=form), plain)
    terms = [plain] + [
        info_nce(**inputs | {"positives": column, "soft": None, "weights": None, "excluded": None})
        for column in inputs["soft"].T
    ]
    expected = sum(terms) if form == "sum_of_logs" else -sum((-term).exp() for term in terms).log()  # type: ignore[union-attr]
    assert torch.allclose(info_nce(**one, form=form), expected)
    empty = inputs | {"soft": inputs["soft"][:, :0], "weights": inputs["weights"][:, :0], "excluded": None}
    assert torch.equal(info_nce(**empty, form=form), plain)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("form", FORMS)
def test_gradients(inputs: dict[str, Any], form: Form, chunk: int | None) -> None:
    """Of embeddings, temperature and weights, against differences; columns outside get none."""
    names = ("anchors", "candidates", "temperature", "weights")
    inputs["temperature"] = torch.tensor(inputs["temperature"], dtype=torch.float64)
    leaves = [inputs[name].clone().requires_grad_() for name in names]

    def loss(*values: Tensor) -> Tensor:
        return info_nce(**inputs | dict(zip(names, values, strict=True)), form=form, chunk=chunk)

    assert torch.autograd.gradcheck(loss, leaves)
    inputs["excluded"][:, 6] = True
    inputs["soft"][inputs["soft"] == 6] = 7
    inputs["positives"][inputs["positives"] == 6] = 7
    found = torch.autograd.grad(loss(*leaves).sum(), leaves[1])[0]
    assert float(found[6].abs().max()) == 0 and float(found[7].abs().max()) > 0


def test_numbers_are_float32_inside_a_half_precision_step(inputs: dict[str, Any]) -> None:
    half = inputs | {name: inputs[name].bfloat16() for name in ("anchors", "candidates", "weights")}
    wide = half | {name: half[name].float() for name in ("anchors", "candidates", "weights")}
    for chunk in (None, 3):
        with torch.autocast("cpu", torch.bfloat16):
            found = info_nce(**half, chunk=chunk)
            assert normalized(half["anchors"]).dtype == torch.float32
        assert found.dtype == torch.float32 and torch.allclose(found, info_nce(**wide, chunk=chunk), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_logits_far_apart_stay_finite(form: Form) -> None:
    """A soft positive e^300 times as likely as the positive, without weight and with little."""
    anchors = torch.tensor([[1.0, 0.0]], requires_grad=True)
    candidates = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    columns = {"positives": torch.tensor([0]), "soft": torch.tensor([[1]])}
    for weight in (0.0, 1e-20):
        weights = torch.full((1, 1), weight, requires_grad=True)
        loss = info_nce(anchors, candidates, temperature=1 / 150, weights=weights, form=form, **columns)
        expected = 300.0 if form == "sum_of_logs" or weight == 0 else -math.log(weight)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
        assert all(bool(value.isfinite().all()) for value in torch.autograd.grad(loss, [anchors, weights]))


def test_both_directions_are_clips_loss_halves() -> None:
    first, second = normalized(made(B, D)), normalized(made(B, D, seed=2))
    logits, own = 9 * first @ second.T, torch.arange(B)
    expected = [F.cross_entropy(one, own, reduction="none") for one in (logits, logits.T)]
    for gradient in ("sum", "official"):
        found = both_directions(first, second, 9, ALONE, gradient)  # type: ignore[arg-type]
        assert all(torch.allclose(one, other) for one, other in zip(found, expected, strict=True))


def test_the_factor_on_logits_starts_and_ends_as_clips() -> None:
    scale = LogitScale()
    assert scale().item() == pytest.approx(1 / 0.07) and [*scale.state_dict()] == ["logit_scale"]
    assert scale.logit_scale.shape == (1,) and scale().shape == ()
    with torch.no_grad():
        scale.logit_scale.fill_(9.0)
    value = scale()
    value.backward()
    assert value.item() == 100 and float(scale.logit_scale.grad or 0) == 0


def test_zero_vectors_have_a_direction_of_none() -> None:
    assert torch.allclose(normalized(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 1e-6), torch.tensor([[0.6, 0.8], [0, 0]]))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"candidates": torch.zeros(N, D + 1)}, r"candidates of shape \[23, 6\] .* allowed: \[23, 5\]"),
        ({"positives": torch.zeros(B + 1, dtype=torch.int64)}, r"positives of shape \[8\]"),
        ({"weights": torch.zeros(B, K + 1)}, r"weights of shape \[7, 4\] .* allowed: \[7, 3\]"),
        ({"excluded": torch.zeros(N, B).bool()}, r"excluded of shape \[23, 7\]"),
        ({"weights": None}, "weights missing"),
        ({"soft": None}, "soft missing"),
        ({"form": "paper"}, "'paper', allowed: sum_of_logs, log_of_sum"),
        ({"temperature": 0}, "temperature=0, allowed: above 0"),
        ({"chunk": 0}, "chunk=0, allowed: above 0"),
    ],
)
def test_what_does_not_fit_is_refused(inputs: dict[str, Any], changed: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        info_nce(**inputs | changed)


def test_sides_and_gradients_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TrainingError, match="allowed: pairs"):
        both_directions(torch.zeros(3, 2), torch.zeros(4, 2), 1.0, ALONE)
    with pytest.raises(TrainingError, match="'mean', allowed: sum, official"):
        both_directions(torch.zeros(3, 2), torch.zeros(3, 2), 1.0, ALONE, "mean")  # type: ignore[arg-type]


Found = dict[tuple[int, int], dict[str, Any]]


@pytest.fixture(scope="module")
def found(in_worlds: Callable[[str], Found]) -> Found:
    return in_worlds("tests.objectives.contrast_program")


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys() and all(float(value.abs().max()) > 1e-3 for value in second.values())
    return all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_and_gradients_are_those_of_one_rank(found: Found, world: int) -> None:
    """Averaged over ranks; by gradient caching; in pieces; with files that come twice and soft positives."""
    expected = found[1, 0]
    for rank in range(world):
        one = found[world, rank]
        assert all(same(one["steps"][accumulation], expected["steps"][1]) for accumulation in (1, 2, 4))
        assert same(one["chunked"], expected["whole"]) and not same(expected["whole"], expected["steps"][1])
    # Both samples are clip 0: all four rows are of one group.
    assert bool(expected["groups"].all())


@pytest.mark.parametrize("world", [2, 4])
def test_the_official_gradient_is_that_of_a_gather_that_keeps_its_own_rows(found: Found, world: int) -> None:
    for rank in range(world):
        one, alone = found[world, rank], found[1, 0]["official"]
        theirs = one["their official"]
        names = [name for name in theirs if name != "weight"]
        assert same({name: one["official"][name] for name in names}, {name: theirs[name] for name in names})
        assert torch.allclose(world * one["official"]["first.weight"], alone["first.weight"], atol=2e-6)
        assert torch.allclose(one["official"]["scale.logit_scale"], alone["scale.logit_scale"], atol=1e-6)
