"""compute.compile: each block is a graph of its own, and equal blocks share it."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from pretrain.engine.compiled_parts import compile_parts
from pretrain.errors import RecipeError
from pretrain.objectives.base import method_of, problems_of
from pretrain.recipe.load import load_recipe

SMALL = ("model.dim=32", "model.heads=2", "model.decoder_dim=32", "model.decoder_heads=2", "model.decoder_depth=1")


class Counter:
    """A back end that compiles nothing and counts what it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _own_limits() -> Any:
    torch._dynamo.reset()
    # Lower than torch's 8, so that few blocks go beyond it.
    with torch._dynamo.config.patch(recompile_limit=2):
        yield
    torch._dynamo.reset()


def built(*overrides: str) -> tuple[Any, dict[str, Any]]:
    method = method_of(load_recipe("demo", [*SMALL, *overrides]))
    torch.manual_seed(0)
    return method.build(), dict(method.example(2))


def test_equal_blocks_share_a_graph_and_names_stay() -> None:
    objective, batch = built("model.depth=4")
    names, counter = list(objective.state_dict()), Counter()
    found = compile_parts(objective, counter)
    assert found[:2] == ["model.encoder.blocks.0", "model.encoder.blocks.1"] and found[-2:] == ["_seen", "_compare"]
    objective(batch).loss.backward()
    assert counter.graphs == 4, "encoder's block, decoder's, pixels in, loss"
    assert list(objective.state_dict()) == names == [name for name in objective.state_dict() if "_orig_mod" not in name]


def test_blocks_that_differ_are_compiled_beyond_torchs_limit() -> None:
    objective, batch = built("model.depth=3", "model.drop_path=0.2")
    counter = Counter()
    compile_parts(objective, counter)
    objective(batch).loss.backward()
    assert counter.graphs == 3 + 1 + 2


def test_gradients_are_those_of_the_plain_model_and_come_block_by_block() -> None:
    objective, batch = built("model.depth=2")
    objective(batch).loss.backward()
    wanted = {name: value.grad for name, value in objective.named_parameters()}
    objective.zero_grad()
    compile_parts(objective, "aot_eager")
    loss = objective(batch).loss
    # One for each block and one for the loss; a model in one graph has one.
    assert backward_graphs(loss.grad_fn) == 2 + 1 + 1
    loss.backward()
    for name, value in objective.named_parameters():
        assert_close(value.grad, wanted[name], msg=name)


def backward_graphs(node: Any) -> int:
    """Count the compiled functions of a backward pass."""
    seen, waiting = set(), [node]
    while waiting:
        one = waiting.pop()
        if one is not None and one not in seen:
            seen.add(one)
            waiting += [next_one for next_one, _ in one.next_functions]
    return sum("CompiledFunction" in one.name() for one in seen)


def test_a_model_without_blocks_is_one_graph_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    objective, _ = built("model.depth=1")
    objective.model = torch.nn.Linear(2, 2)
    assert compile_parts(objective, Counter())[0] == "model"
    assert "no blocks" in caplog.text


def test_what_compiled_blocks_hide_from_selective_recomputation_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"compute\.activation_checkpointing: found selective with compute\.compile"):
        recipe = load_recipe("demo", ["compute.compile=true", "compute.activation_checkpointing=selective"])
        raise RecipeError(problems_of(method_of(recipe)))
