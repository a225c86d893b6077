"""Official SNCLR: features, projections, predictions, neighbours, positiveness, losses, gradients, queue and momentum
weights of a step; the loss alone with and without threshold, on one process and on two; the released layout."""

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.models import moco_vit
from pretrain.objectives import snclr
from pretrain.objectives.contrast import normalized
from pretrain.objectives.snclr_queue import KeyQueue, Neighbours
from pretrain.objectives.snclr_weights import released_state
from pretrain.recipe.schema import Recipe
from pretrain.runtime.process_group import Ranks
from pretrain.samples import image_views

KINDS = ("snclr",)
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
LOSSES = {"atol": 1e-5, "rtol": 0.0}
VIEWS = ("a", "b")


def options_of(case, **changed) -> snclr.Config:
    given = case.meta["config"]
    return snclr.Config(
        dim=given["fdim"], hidden=given["mlp_dim"], temperature=given["T"], momentum=given["m"], momentum_rises=False,
        neighbours=given["topk"], queue=given["bank"], threshold=given["threshold"], **changed,
    )  # fmt: skip


def build(case, **changed) -> snclr.SNCLRObjective:
    """The whole objective, with official weights, and the queue as it was before the step."""
    given = case.meta["config"]
    model = moco_vit.Config(
        image_size=given["img"], patch_size=given["patch"], dim=given["dim"], depth=given["depth"],
        heads=given["heads"], mlp_ratio=given["mlp"],
    )  # fmt: skip
    size = image_views.Config(height=given["img"], width=given["img"])
    recipe = Recipe(model=model, objective=options_of(case, **changed), input=size)
    objective = snclr.SNCLRMethod(recipe).build()
    weights = {f"module.{name}": value for name, value in load_file(case.weights).items()}
    objective.load_pretrained("weights", weights)
    tensors = case.tensors()
    objective.queue.entries.copy_(tensors["bank_before"].t())
    objective.queue._pointer.fill_(int(tensors["bank_ptr_before"]))
    return objective


def embedded(objective: snclr.SNCLRObjective, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings of the two views, which are normalised pixels already."""
    views = torch.stack((tensors["x1"], tensors["x2"]), dim=1).flatten(0, 1)
    return objective.embed_pixels(views.permute(0, 2, 3, 1)[:, None], torch.zeros(len(views) // 2, dtype=torch.int64))


def test_evaluation(case) -> None:
    objective, tensors = build(case).eval(), case.tensors()
    with torch.no_grad():
        features = objective.model(tensors["x1"])
        torch.testing.assert_close(features, tensors["eval_trunk_x1"], **TOLERANCE)
        projected = objective.projector(features)
        torch.testing.assert_close(projected, tensors["eval_proj_x1"], **TOLERANCE)
        torch.testing.assert_close(objective.predictor(projected), tensors["eval_pred_x1"], **TOLERANCE)


def test_step(case) -> None:
    """As officially the momentum encoder follows first; keys are put in behind the update."""
    objective, tensors = build(case).train(), case.tensors()
    objective.follow(case.meta["config"]["m"])
    rows = embedded(objective, tensors)
    for view, name in enumerate(VIEWS):
        torch.testing.assert_close(rows[f"prediction_{view}"], tensors[f"train_{name}_q"], **TOLERANCE)
        torch.testing.assert_close(rows[f"projection_{view}"], tensors[f"train_{name}_q_pre"], **TOLERANCE)
        key = rows[f"key_{1 - view}"]
        found = objective.neighbours(key, rows["file"])
        torch.testing.assert_close(found.vectors.flatten(0, 1), tensors[f"train_{name}_k_nn"], **TOLERANCE)
        kept = torch.cat((key[:, None], found.vectors), dim=1).flatten(0, 1)
        torch.testing.assert_close(kept, tensors[f"train_{name}_k_keep"], **TOLERANCE)
        positiveness = objective.positiveness(rows[f"projection_{view}"], normalized(found.vectors))
        labels = tensors[f"train_{name}_labels"].unflatten(1, (len(key), -1))
        torch.testing.assert_close(positiveness, labels.diagonal().t(), **TOLERANCE)
        loss, _ = objective.contrast(rows[f"prediction_{view}"], rows[f"projection_{view}"], key, found)
        torch.testing.assert_close(loss.mean(), tensors[f"train_{name}_loss"], **LOSSES)
    loss, _ = objective.compare(rows)
    torch.testing.assert_close(loss, tensors["train_loss"], **LOSSES)
    loss.backward()
    parts = {"base_encoder.head.0": objective.projector.get_submodule("0"), "predictor.3": objective.predictor[3]}
    gradients = {f"{name}.weight": part.weight.grad for name, part in parts.items()}
    gradients |= {f"base_encoder.{name}": value.grad for name, value in objective.model.named_parameters()}
    for name, value in tensors.items():
        if name.startswith("grad_"):
            torch.testing.assert_close(gradients[name.removeprefix("grad_")], value, **TOLERANCE)
    assert objective.model.patch_embed.proj.weight.grad is None
    torch.testing.assert_close(objective.queue.entries.t(), tensors["bank_before"], rtol=0, atol=0)
    objective.options.momentum = 1.0
    objective.before_step(0, 1, 1)
    objective.after_step()
    torch.testing.assert_close(objective.queue.entries.t(), tensors["bank_after"], **TOLERANCE)
    assert objective.queue.pointer == int(tensors["bank_ptr_after"])
    state = released_state(objective)
    for name, value in tensors.items():
        if name.startswith("after_"):
            torch.testing.assert_close(state[f"module.{name.removeprefix('after_')}"], value, **TOLERANCE)


def loss_alone(case, rank: int, ranks: int, threshold: bool, monkeypatch) -> dict[str, Tensor]:
    """The loss of a rank's rows among all; what the test puts together, in the order of positions, is gathered."""
    objective, tensors = build(case).train(), case.tensors()
    objective.options.threshold = threshold
    named = {name: tensors[f"{'unit' if ranks == 1 else 'w2'}_{name}"] for name in ("q", "q_pre", "k", "k_keep")}
    rows = {name: (value if ranks == 1 else value[rank]).clone() for name, value in named.items()}
    q, pre, count = rows["q"].requires_grad_(), rows["q_pre"].requires_grad_(), len(rows["q"])
    neighbours = normalized(rows["k"].unflatten(0, (count, -1)))
    yes = torch.ones(neighbours.shape[:2], dtype=torch.bool)
    weights = objective.counted(objective.positiveness(pre, neighbours), Neighbours(neighbours, ~yes, yes))
    targets = normalized(named["k_keep"]).reshape(ranks, count, -1, q.shape[-1])
    monkeypatch.setattr(snclr, "present_ranks", lambda device: Ranks(rank, ranks, 0, device))
    monkeypatch.setattr(snclr, "gather", lambda *_: targets.transpose(0, 1).flatten(0, 1))
    loss = objective.losses(q, targets[rank], weights).mean()
    loss.backward()
    assert q.grad is not None and pre.grad is not None
    return {"loss": loss.detach(), "grad_q": q.grad, "grad_q_pre": pre.grad}


def test_loss(case, monkeypatch) -> None:
    tensors = case.tensors()
    for ranks, prefix in ((1, "unit"), (2, "w2")):
        for threshold in (0, 1):
            for rank in range(ranks):
                for name, value in loss_alone(case, rank, ranks, bool(threshold), monkeypatch).items():
                    wanted = tensors[f"{prefix}_{name}_thr{threshold}"]
                    wanted = wanted[rank] if ranks > 1 else wanted
                    torch.testing.assert_close(value, wanted, **(LOSSES if name == "loss" else TOLERANCE))


def test_layout_goes_in_and_out(case) -> None:
    weights, state = load_file(case.weights), released_state(build(case))
    assert state.keys() == {f"module.{name}" for name in weights}
    assert all(torch.equal(value, state[f"module.{name}"]) for name, value in weights.items())


def test_queue_is_a_ring_that_drops_at_its_end() -> None:
    for size, start, rows, pointer in ((17, 11, 6, 0), (17, 12, 6, 0), (24, 18, 4, 22), (24, 20, 4, 0)):
        queue = KeyQueue(size, 2, seed=1, of_rank=False)
        queue._pointer.fill_(start)
        before, keys = queue.entries.clone(), torch.arange(2.0 * rows).reshape(rows, 2) + 1
        queue.enqueue(keys, torch.arange(rows))
        written = min(rows, size - start)
        assert torch.equal(queue.entries[start : start + written], keys[:written])
        assert torch.equal(queue.entries[:start], before[:start]) and queue.pointer == pointer
        assert torch.equal(queue.past.nonzero()[:, 0], torch.arange(start, start + written))
