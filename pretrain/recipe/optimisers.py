"""The optimisers that a recipe can name: what each reads of `optim`, keeps for a parameter, and needs to update it."""

from dataclasses import dataclass

from pretrain.recipe.schema import Optim


@dataclass(frozen=True)
class OptimiserKind:
    """One kind of optimiser.

    Attributes:
        title: for people.
        keys: of `optim`, options of its class of the same names, that not all kinds read.
        moments: states of a weight's size; None: one where there is momentum.
        fuses: it has one kernel for a whole update on accelerators.
        sharded: it can work on pieces of tensors, as ZeRO's optimisers hand them out.
        temporaries: bytes a parameter while torch updates operation by operation: Adam's are the root of the second
            moment and what bias correction makes of it (adam.py, _single_tensor_adam), LARS's the gradient with decay.
        copies_to_decay: further 4 where there is weight decay: the gradient with it (sgd.py, _single_tensor_sgd).
    """

    title: str
    keys: tuple[str, ...]
    moments: int | None
    fuses: bool = True
    sharded: bool = True
    temporaries: int = 0
    copies_to_decay: bool = True


#: By `optim.name`; the classes themselves are in engine/optimiser.py.
OPTIMISERS = {
    "adamw": OptimiserKind("AdamW", ("betas", "eps"), 2, temporaries=8, copies_to_decay=False),
    "adam": OptimiserKind("Adam", ("betas", "eps"), 2, temporaries=8),
    "sgd": OptimiserKind("SGD", ("momentum", "nesterov"), None),
    "lars": OptimiserKind(
        "LARS", ("momentum", "trust"), None, fuses=False, sharded=False, temporaries=4, copies_to_decay=False
    ),
}


def moments_of(optim: Optim) -> int:
    """Count the states of a weight's size that the optimiser keeps for each parameter."""
    moments = OPTIMISERS[optim.name].moments
    return int(optim.momentum > 0) if moments is None else moments


def temporary_bytes(optim: Optim) -> int:
    """Count bytes a parameter of temporaries, where torch updates a flat tensor operation by operation (a CPU)."""
    kind = OPTIMISERS[optim.name]
    return kind.temporaries + 4 * (kind.copies_to_decay and optim.weight_decay > 0)


def describe_optimiser(optim: Optim) -> str:
    """Name the optimiser, with what says how far it goes in a step."""
    kind = OPTIMISERS[optim.name]
    told = {"momentum": f"momentum {optim.momentum:g}", "trust": f"trust {optim.trust:g}"}
    if optim.nesterov:
        told["nesterov"] = "Nesterov's"
    words = ", ".join(told[key] for key in kind.keys if key in told)
    return f"{kind.title} ({words})" if words else kind.title
