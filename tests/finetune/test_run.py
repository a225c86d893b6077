"""Fine-tuning as a user runs it: train, validate, keep the best, stop, resume, test, score again."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.classification.examples import pick_examples, save_examples
from finetune.classification.predictions import read_predictions
from finetune.classification.validation import centre_view, video_sets
from finetune.commands import replay
from finetune.commands.finetune import main
from finetune.recipe import load_tune_recipe
from pretrain.checkpoint.consolidate import consolidated_state
from pretrain.models.initial_weights import read_weights

#: All that is random in the network.
RANDOM = (
    "model.drop_path=0.3", "model.dropout=0.1", "model.attention_dropout=0.1", "model.head_dropout=0.3",
    "augment.erasing=0.5",
)  # fmt: skip


def training(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]


@pytest.fixture(scope="module")
def whole(toy: Any) -> str:
    """One uninterrupted run with averaged weights, mixing, augmentation, dropout."""
    return str(toy.run("whole", "ema.decay=0.9", *RANDOM))


def test_run_from_start_to_test(toy: Any, whole: str) -> None:
    records = toy.records("whole")
    assert [step for step, _ in training(records)] == [1, 2, 3, 4, 5, 6]
    evaluated = {record["step"]: record["eval/top1"] for record in records if "eval/top1" in record}
    assert sorted(evaluated) == [2, 4, 6]
    best = json.loads((toy.folder / "whole" / "best.json").read_text())
    assert best["value"] == max(evaluated.values()) and evaluated[best["step"]] == best["value"]
    kept = {path.name for path in (toy.folder / "whole" / "checkpoints").iterdir()}
    assert kept == {"step_00000006", f"step_{best['step']:08d}"}, "the last one and the best one"
    assert "as even as 3.0 equal classes" in whole and "run.init_weights is null" in whole


def test_test_covers_every_video_once_with_all_views(toy: Any, whole: str) -> None:
    folder = toy.folder / "whole" / "predictions" / "step_00000006"
    predictions = read_predictions(folder)
    assert predictions.logits.shape == (11, 6, 3) and len(set(predictions.keys)) == 11
    assert {key.rsplit("/", 1)[0] for key in predictions.keys} == {"toy/s-000000", "toy/s-000001"}
    assert predictions.names == ["down", "left", "right"]
    assert sorted(predictions.targets.tolist()) == sorted(n % 3 for n in range(11))
    assert np.ptp(predictions.logits, axis=1).max() > 0, "views of a video differ"


def test_a_step_can_be_replayed_with_its_mixing(toy: Any, whole: str, capsys: pytest.CaptureFixture[str]) -> None:
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    # As many as the run had: a sum in other parts is rounded otherwise.
    torch.set_num_threads(1)
    assert replay.main([str(toy.folder / "whole"), "1"]) == 0
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
    output = capsys.readouterr().out
    assert "first weights" in output and "everything is finite" in output
    path = toy.folder / "whole" / "incidents" / "replay_step_00000001.json"
    losses = [batch["loss"] for batch in json.loads(path.read_text())["micro_batches"]]
    assert len(losses) > 1 and sum(losses) / len(losses) == training(toy.records("whole"))[0][1]


def test_examples_are_drawn_with_their_classes(toy: Any, whole: str, tmp_path: Path) -> None:
    """Videos at even distances; what is drawn of each is what the predictions hold."""
    recipe = load_tune_recipe(str(toy.folder / "whole" / "recipe.yaml"))
    predictions = read_predictions(toy.folder / "whole" / "predictions" / "step_00000006")
    sets = video_sets(recipe, test=True)
    examples = pick_examples(predictions, sets, centre_view(recipe), 4, 60)
    rows = {key: row for row, key in enumerate(predictions.keys)}
    # Keys of the second shard start again at 0000: videos 0, 3, 7 and 10 of all.
    keys = [f"toy/{name}" for name in ("s-000000/0000", "s-000000/0003", "s-000001/0002", "s-000001/0005")]
    assert [example.target for example in examples] == [int(predictions.targets[rows[key]]) for key in keys]
    for example, key in zip(examples, keys, strict=True):
        assert np.array_equal(example.probabilities, predictions.merged[rows[key]])
        assert example.clip.shape == (4, 32, 32, 3)
    save_examples(examples, predictions.names, tmp_path / "examples.png")
    drawn = toy.folder / "whole" / "predictions" / "step_00000006" / "examples.png"
    assert Image.open(drawn).height == 2 * Image.open(tmp_path / "examples.png").height, "8 by default"


def test_runs_side_by_side(toy: Any, whole: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = toy.folder / "whole"
    assert main(["--compare", str(run), str(run)]) == 0
    head, row, again, chance = capsys.readouterr().out.splitlines()
    scores = json.loads((run / "predictions" / "step_00000006" / "scores.json").read_text())
    trained = sum(value.numel() for name, value in consolidated_state(run / "checkpoints" / "step_00000006").items()
                  if name.startswith("model."))  # fmt: skip
    assert row == again and row.split()[:4] == [str(run), "scratch", "full", f"{trained:,}"]
    assert row.split()[4] == f"{scores['top1']:.1f}" and "top-1" in head
    assert row.split()[-1] == "-", "of three classes there is no top-5"
    assert chance.split()[-3:] == ["33.3", "%", "-"] and "3 classes" in chance
    assert main(["--compare", str(toy.folder)]) == 1
    assert "was not tested" in capsys.readouterr().err


def test_stopped_and_resumed_is_the_same_run(toy: Any, whole: str) -> None:
    toy.run("parts", "ema.decay=0.9", *RANDOM, "schedule.max_steps=3", "checkpoint.every_steps=1")
    toy.run("parts", "ema.decay=0.9", *RANDOM, "checkpoint.every_steps=1")
    assert training(toy.records("parts")) == training(toy.records("whole"))
    one, two = (consolidated_state(toy.folder / name / "checkpoints" / "step_00000006") for name in ("whole", "parts"))
    assert any(name.startswith("average.") for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one), "averaged weights too"
    scores = [json.loads((toy.folder / name / "predictions/step_00000006/scores.json").read_text())
              for name in ("whole", "parts")]  # fmt: skip
    assert scores[0] == scores[1]


def test_best_checkpoint_can_be_tested_and_rescored(toy: Any, whole: str) -> None:
    best = json.loads((toy.folder / "whole" / "best.json").read_text())["step"]
    toy.run("whole", "ema.decay=0.9", *RANDOM, "--test", "best", "evaluate.clips=1", "evaluate.crops=1")
    folder = toy.folder / "whole" / "predictions" / f"step_{best:08d}"
    assert read_predictions(folder).logits.shape == (11, 1, 3)
    before = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").unlink()
    assert main(["--rescore", str(folder)]) == 0
    assert json.loads((folder / "scores.json").read_text()) == before
    assert main(["--rescore", str(toy.folder)]) == 1


def test_fine_tuned_weights_start_another_run(toy: Any, whole: str) -> None:
    start = f"run.init_weights={toy.folder / 'whole'}"
    printed = toy.run(
        "next", start, "schedule.max_steps=1", "tune.method=linear", "start.head=new", "evaluate.test=none"
    )
    assert "tensors matched" in printed and "is left out: a new one is asked for" in printed
    one = consolidated_state(toy.folder / "whole" / "checkpoints" / "step_00000006")
    two = consolidated_state(toy.folder / "next" / "checkpoints" / "step_00000001")
    averaged = {name: one[f"average.{name.removeprefix('model.').replace('.', '|')}"] for name in two
                if name.startswith("model.")}  # fmt: skip
    changed = {name for name, value in averaged.items() if not torch.equal(value, two[name])}
    task = {"model.head.weight", "model.head.bias", "model.fc_norm.weight", "model.fc_norm.bias"}
    assert "model.head.weight" in changed and changed <= task
    live = read_weights(str(toy.folder / "whole"), averaged=False)
    assert all(torch.equal(value, one[f"model.{name}"]) for name, value in live.items())
    assert not torch.equal(live["blocks.0.attn.proj.weight"], averaged["model.blocks.0.attn.proj.weight"])


def test_bf16_masters_are_merged_from_zero_stage_1(toy: Any) -> None:
    toy.run("masters", "schedule.max_steps=2", "zero.stage=1", "compute.dtype=bf16", "evaluate.every_epochs=9")
    folder = toy.folder / "masters" / "checkpoints" / "step_00000002"
    computed = torch.load(folder / "deepspeed" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    merged = consolidated_state(folder)
    assert merged.keys() == computed.keys()
    assert all(torch.equal(merged[name].bfloat16(), value) for name, value in computed.items())
    weight = "model.blocks.0.attn.qkv.weight"
    assert not torch.equal(merged[weight], computed[weight].float()), "more digits than the model computes with"


@pytest.fixture(scope="module")
def sharded(toy: Any) -> tuple[str, ...]:
    """A run begun on one rank without ZeRO; trained on, validated and tested on two in stage 3, by other micro-batches.

    Returns its words.
    """
    words = ("ema.decay=0.8", *RANDOM, "checkpoint.every_steps=1", "checkpoint.keep_last=9")
    toy.run("sharded", *words, "schedule.max_steps=3")
    toy.run("sharded", *words, "zero.stage=3", "batch.micro=2", "compute.activation_checkpointing=true", ranks=2)
    return words


def test_mixing_and_dropout_are_the_same_on_two_ranks(toy: Any, whole: str, sharded: tuple[str, ...]) -> None:
    losses = [[loss for _, loss in training(toy.records(name))] for name in ("whole", "sharded")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)
    assert len(losses[0]) == 6 and np.ptp(losses[0]) > 0.01
    folders = [toy.folder / name / "checkpoints" / "step_00000006" for name in ("whole", "sharded")]
    one, two = map(consolidated_state, folders)
    for name in (name for name in one if name.startswith("model.")):
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_averages_are_sharded_and_move_between_stages(toy: Any, sharded: tuple[str, ...]) -> None:
    """Begun on one rank, trained on two, tested on one again."""
    run, folder = toy.folder / "sharded", toy.folder / "sharded" / "predictions" / "step_00000006"
    shares = [torch.load(run / f"checkpoints/step_00000004/deepspeed/zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
                         weights_only=False)["module"]["average.head|weight"] for rank in range(2)]  # fmt: skip
    assert [tuple(share.shape) for share in shares] == [(72,), (72,)]
    before, after = (consolidated_state(run / "checkpoints" / f"step_0000000{step}") for step in (3, 4))
    expected = before["average.head|weight"].lerp(after["model.head.weight"], 1 - 0.8)
    assert torch.equal(torch.cat(shares).view(3, 48), expected) and torch.equal(after["average.head|weight"], expected)
    assert int(before["average.updates"]) == 3 and not torch.equal(expected, after["model.head.weight"])
    two = read_predictions(folder)
    toy.run("sharded", *sharded, "--test", "last")  # whole weights in place of shards
    one = read_predictions(folder)
    order = [one.keys.index(key) for key in two.keys]
    np.testing.assert_allclose(one.logits[order], two.logits, rtol=1e-5, atol=1e-6)


def test_exit_codes(toy: Any, tmp_path: Path) -> None:
    assert "model.classes=5" in toy.run("wrong", "model.classes=5", expect=1)
    assert "did you mean" in toy.run("wrong", "evaluate.clip=5", expect=2)
    shutil.rmtree(toy.folder / "wrong", ignore_errors=True)
    assert "no checkpoint that verifies" in toy.run("wrong", "--test", "last", expect=1)


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_weights_are_whole_in_float32(toy: Any, stage: int) -> None:
    """ZeRO's parts hold what is trained; the frozen rest must come from the model, or nothing could be tested."""
    name = f"frozen_{stage}"
    toy.run(name, "tune.method=linear", f"zero.stage={stage}", "schedule.max_steps=2", "evaluate.every_epochs=9")
    folder = toy.folder / name / "checkpoints" / "step_00000002"
    computed = torch.load(folder / "deepspeed" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    merged = consolidated_state(folder)
    assert merged.keys() == computed.keys() and "model.blocks.0.attn.qkv.weight" in merged
    assert all(torch.equal(merged[name], value) for name, value in computed.items())
