"""VideoMAE's objective: targets, loss, options, pictures and reference errors."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing import assert_close

from pretrain.data.randomness import generator
from pretrain.models.cubes import complement, cut_cubes, grid_of, take_tokens
from pretrain.models.videomae import Config as ModelConfig
from pretrain.objectives import videomae
from pretrain.objectives.videomae import PICTURE_MAX, VideoMAEMethod, VideoMAEObjective, weighted_mean
from pretrain.recipe.schema import Recipe, Run
from pretrain.samples.clip import Config as ClipConfig
from pretrain.samples.masks import draw

MODEL = ModelConfig(
    size="custom",
    patch_size=4,
    dim=24,
    depth=1,
    heads=2,
    mlp_ratio=2.0,
    decoder_dim=16,
    decoder_depth=1,
    decoder_heads=2,
)


def recipe(height: int = 16, frames: int = 8, model: ModelConfig = MODEL, **options) -> Recipe:
    return Recipe(
        model=model,
        objective=videomae.Config(**({"mask_ratio": 0.75} | options)),
        input=ClipConfig(frames=frames, height=height, width=16),
        run=Run(seed=0),
    )


def batch_of(given: Recipe, clips: int = 3) -> dict[str, Tensor]:
    plan = VideoMAEMethod(given).mask_plan()
    views = [
        draw(plan, generator(0, clip, "encoder_mask"), generator(0, clip, "decoder_mask")) for clip in range(clips)
    ]
    batch = {name: torch.from_numpy(np.stack([view[name] for view in views])) for name in views[0]}
    shape = (clips, given.input.frames, given.input.height, given.input.width, 3)
    coarse = torch.randint(0, 256, (clips, given.input.frames, 4, 4, 3), generator=torch.Generator().manual_seed(0))
    smooth = coarse.repeat_interleave(given.input.height // 4, 2).repeat_interleave(4, 3)
    noise = torch.randint(-20, 20, shape, generator=torch.Generator().manual_seed(1))
    return batch | {"video": (smooth + noise).clamp(0, 255).to(torch.uint8)}


def build(given: Recipe) -> VideoMAEObjective:
    torch.manual_seed(0)
    return VideoMAEMethod(given).build()


class Oracle(nn.Module):
    """Predicts the targets that it was given, for every token."""

    def __init__(self, answers: Tensor, given: Recipe) -> None:
        super().__init__()
        self.answers = answers
        self.shape = SimpleNamespace(tubelet=2, patch_size=4)
        self.grid = grid_of(given.input.frames, given.input.height, given.input.width, 2, 4)

    def forward(self, cubes: Tensor, visible: Tensor, targets: Tensor) -> Tensor:
        return take_tokens(self.answers, targets)


def oracle(batch: dict[str, Tensor], given: Recipe, normalize: bool, scale: float = 1.0) -> VideoMAEObjective:
    answers = build(recipe(normalize_targets=normalize)).target(cut_cubes(batch["video"], 2, 4).float() / 255)
    return VideoMAEObjective(Oracle(answers * scale, given), normalize)


def test_loss_counts_only_hidden_tokens() -> None:
    given = recipe()
    batch, objective = batch_of(given), build(given)
    assert 0 < batch["weight"].mean() < 1, "some mask tokens must collide with visible positions"
    pixels = cut_cubes(batch["video"], 2, 4).float() / 255
    normalized = objective.normalization(take_tokens(pixels, batch["visible"]))
    predicted = objective.model(normalized, batch["visible"], batch["targets"])
    target = objective.target(take_tokens(pixels, batch["targets"]))
    total, count = 0.0, 0
    for clip in range(3):
        for token, index in enumerate(batch["targets"][clip].tolist()):
            if index not in batch["visible"][clip].tolist():
                total += (predicted - target)[clip, token].square().mean().item()
                count += 1
    output = objective(batch)
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)
    assert output.metrics["loss"].item() == output.loss.item() and not output.metrics["loss"].requires_grad


def test_without_decoder_mask_it_is_version_1() -> None:
    given = recipe(decoder_mask="none")
    batch, objective = batch_of(given), build(given)
    pixels = cut_cubes(batch["video"], 2, 4).float() / 255
    hidden = complement(batch["visible"], pixels.shape[1])
    assert_close(batch["targets"], hidden)
    seen = objective.normalization(take_tokens(pixels, batch["visible"]))
    predicted = objective.model(seen, batch["visible"], hidden)
    expected = nn.functional.mse_loss(predicted, objective.target(take_tokens(pixels, hidden)))
    assert_close(objective(batch).loss, expected)


def test_targets_by_hand() -> None:
    objective = build(recipe())
    pixels = torch.rand(1, 2, 96)
    pixels[:, 1] *= 1e-3  # so dark that it matters whether epsilon is added to the deviation or to the variance
    found = objective.target(pixels)
    for token in range(2):
        for channel in range(3):
            values = pixels[0, token, channel::3].double()
            expected = (values - values.mean()) / (values.std(unbiased=True) + 1e-6)
            assert_close(found[0, token, channel::3].double(), expected, rtol=1e-4, atol=1e-5)
    assert_close(objective.target(torch.full((1, 1, 96), 0.3)), torch.zeros(1, 1, 96), rtol=0, atol=0.1)
    assert_close(build(recipe(normalize_targets=False)).target(pixels), pixels)


def test_pixels_as_bytes_and_as_floats_are_the_same() -> None:
    given = recipe()
    batch, objective = batch_of(given), build(given)
    assert_close(objective(batch).loss, objective(batch | {"video": batch["video"].float() / 255}).loss)


def test_leaving_out_seen_mask_tokens_counts_the_same_tokens() -> None:
    both, fewer = batch_of(recipe()), batch_of(recipe(skip_visible_mask_tokens=True))
    assert fewer["targets"].shape[1] < both["targets"].shape[1]
    assert fewer["weight"].min() == 1 and fewer["weight"].sum() == both["weight"].sum()
    given = recipe(skip_visible_mask_tokens=True)
    assert fewer["targets"].shape[1] == VideoMAEMethod(given).cost().tokens["reconstructed"]
    assert VideoMAEMethod(given).cost().published < VideoMAEMethod(recipe()).cost().published
    assert build(given)(fewer).loss.isfinite()


@pytest.mark.parametrize("normalize", [True, False])
def test_a_perfect_prediction_gives_the_original(normalize: bool) -> None:
    given = recipe()
    batch = batch_of(given)
    objective = oracle(batch, given, normalize)
    assert objective(batch).loss < 1e-10
    pictures = objective.pictures(batch)
    limit = batch["video"].clamp(max=round(PICTURE_MAX * 255))
    assert list(pictures) == ["original", "masked", "reconstructed"]
    assert (pictures["original"] == batch["video"]).all()
    assert (pictures["reconstructed"].clamp(max=round(PICTURE_MAX * 255)).int() - limit.int()).abs().max() <= 1
    cubes = cut_cubes(pictures["masked"], 2, 4)
    assert (
        take_tokens(cubes, batch["visible"]) == take_tokens(cut_cubes(batch["video"], 2, 4), batch["visible"])
    ).all()
    hidden = take_tokens(cubes, complement(batch["visible"], cubes.shape[1]))
    assert hidden.unique().tolist() == [128]
    assert objective.reconstruction_errors(batch)["model"] < 2e-3


def test_reference_errors_by_hand() -> None:
    given = recipe()
    batch = batch_of(given)
    errors = build(given).reconstruction_errors(batch)
    video = batch["video"].float() / 255
    cubes = cut_cubes(video, 2, 4)
    counted = torch.cat([cubes[i, batch["targets"][i][batch["weight"][i] == 1]] for i in range(3)])
    assert_close(errors["masked_input"], (counted - 0.5).square().mean().sqrt())
    squares = []
    for clip in range(3):
        color = cubes[clip, batch["visible"][clip]].reshape(-1, 3).mean(0)
        truth = cubes[clip, batch["targets"][clip][batch["weight"][clip] == 1]].reshape(-1, 3)
        squares.append((truth - color).square().mean())
    assert_close(errors["mean_color"], torch.stack(squares).mean().sqrt())
    assert errors["cube_mean_color"] < errors["mean_color"] < errors["masked_input"] * 2


@pytest.mark.parametrize("normalize", [True, False])
def test_mean_color_loss_is_that_of_predicting_each_cubes_mean(normalize: bool) -> None:
    given = recipe(normalize_targets=normalize)
    batch, objective = batch_of(given), build(given)
    truth = take_tokens(cut_cubes(batch["video"], 2, 4), batch["targets"]).float() / 255
    target = objective.target(truth)
    mean = target.unflatten(-1, (-1, 3)).mean(-2, keepdim=True).expand(-1, -1, 32, -1).flatten(-2)
    expected = weighted_mean((mean - target).square().mean(-1), batch["weight"])
    assert_close(objective(batch).metrics["mean_color_loss"], expected)


def test_casting_the_objective_rounds_no_constants() -> None:
    given = recipe()
    batch, objective = batch_of(given), build(given)
    exact = objective(batch).loss
    objective.bfloat16()
    assert {buffer.dtype for buffer in objective.buffers()} == {torch.float32}
    assert objective(batch).loss.dtype == torch.float32
    assert_close(objective(batch).loss, exact, rtol=0.02, atol=0)


def test_gradients_reach_every_parameter() -> None:
    given = recipe()
    objective = build(given)
    objective(batch_of(given)).loss.backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in objective.parameters())


def test_compiles_with_its_batch_as_one_graph() -> None:
    given = recipe()
    batch, objective = batch_of(given), build(given)
    torch._dynamo.reset()
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    assert_close(compiled(batch).loss, objective(batch).loss)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (recipe(height=12), "even number of cubes"),
        (recipe(decoder_mask_ratio=0.3), "decoder_mask_ratio=0.3"),
        (recipe(mask_ratio=0.01), "mask_ratio=0.01"),
        (recipe(height=18), "input.height=18"),
        (recipe(frames=12, skip_visible_mask_tokens=True), "skip_visible_mask_tokens"),
        (recipe(model=replace(MODEL, heads=7)), "model.heads=7"),
    ],
)
def test_check_names_what_cannot_work(given: Recipe, word: str) -> None:
    problems = VideoMAEMethod(given).problems()
    assert word in " ".join(problems)


def test_check_accepts_what_works() -> None:
    for given in (recipe(), recipe(height=12, decoder_mask="none"), recipe(frames=2), recipe(decoder_mask="random")):
        assert VideoMAEMethod(given).problems() == []
        assert build(given)(batch_of(given)).loss.isfinite()


def test_the_step_compiles_as_one_graph() -> None:
    """Targets, model and loss without a break: static shapes, nothing that waits for a value."""
    given = recipe()
    objective, batch = build(given), batch_of(given)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(objective)(batch)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    assert_close(compiled(batch).loss, objective(batch).loss)


def test_the_step_never_waits_for_a_value() -> None:
    """On tensors without content, reading a value (which makes the host wait for the device) is an error."""
    given = recipe()
    trace_of(given, build(given))
    curious = build(given)
    target = curious._target
    curious._target = lambda pixels: target(pixels) if float(pixels.sum()) else None  # type: ignore
    with pytest.raises(DataDependentOutputException):
        trace_of(given, curious)


def trace_of(given: Recipe, objective: VideoMAEObjective) -> None:
    batch = batch_of(given)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(value) for name, value in batch.items()}
        objective.to_empty(device="cpu")(fake).loss.backward()
