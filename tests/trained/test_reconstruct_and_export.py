"""From a run folder to pictures, numbers and weights: what launch/reconstruct.py and launch/export.py do."""

import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune.commands import export
from pretrain.checkpoint.consolidate import consolidated_state
from pretrain.commands import reconstruct
from pretrain.errors import CheckpointError, WeightsError
from pretrain.trained import load_run
from pretrain.trained.load_run import load_trained
from tests.toy_run import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(toy):
    """A run of two processes with sharded weights (ZeRO 3), two checkpoints."""
    toy.train("trained", "zero.stage=3", "schedule.max_steps=6", ranks=2)
    return toy.folder / "trained"


def shards(run: Path) -> str:
    return str(run.parent / "shards")


def test_weights_of_all_shards_are_merged(run):
    newest = load_trained(run)
    assert newest.source.name == "step_00000006"
    state = consolidated_state(newest.source)
    loaded = dict(newest.objective.state_dict())
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], loaded[name]) for name in state)
    assert float(loaded["model.encoder.blocks.0.attn.qkv.weight"].std()) > 0.01


def test_zero_stages_export_the_same_weights(toy, run):
    toy.train("plain", "zero.stage=0", "schedule.max_steps=6")
    plain, sharded = load_trained(toy.folder / "plain"), load_trained(run)
    for (name, one), (_, other) in zip(
        plain.objective.state_dict().items(), sharded.objective.state_dict().items(), strict=True
    ):
        assert torch.allclose(one, other, atol=2e-4), name


def test_an_older_checkpoint_can_be_named(run):
    older = load_trained(run / "checkpoints" / "step_00000004")
    assert not torch.equal(older.objective.model.mask_token, load_trained(run).objective.model.mask_token)


def test_weights_that_are_not_finite_are_refused(run, monkeypatch):
    spoilt = consolidated_state(run / "checkpoints" / "step_00000006")
    spoilt["model.decoder.head.weight"][3, 2] = float("nan")
    monkeypatch.setattr(load_run, "consolidated_state", lambda _: spoilt)  # as a run that diverged has left it
    with pytest.raises(WeightsError, match=r"6: 1 of \d+ weights are not finite: model.decoder.head.weight"):
        load_trained(run)


def test_a_damaged_checkpoint_is_passed_over(run, tmp_path):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    victim = next((copy / "checkpoints" / "step_00000006").rglob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert load_trained(copy).source.name == "step_00000004"
    with pytest.raises(CheckpointError, match="sha256"):
        load_trained(copy / "checkpoints" / "step_00000006")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run"):
        load_trained(tmp_path)


@pytest.mark.parametrize("layout", ["safetensors", "official", "huggingface"])
def test_exports_hold_the_weights_of_the_run(run, tmp_path, layout, capsys):
    from pretrain.models.weights import read_state

    dest = tmp_path / ("weights.pth" if layout == "official" else "weights")
    assert export.main([str(run), str(dest), "--format", layout]) == 0
    assert "step_00000006" in capsys.readouterr().out
    model = load_trained(run).objective.model
    state = read_state(str(dest))
    assert state.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(state[name], parameter) for name, parameter in model.named_parameters())


def test_an_export_opens_like_its_run(run, tmp_path):
    assert export.main([str(run), str(tmp_path / "weights")]) == 0
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "| train/loss | " in card and "| step_00000006 |" in card and "mask_ratio: " in card
    again = load_trained(tmp_path / "weights")
    assert torch.equal(again.objective.model.mask_token, load_trained(run).objective.model.mask_token)


WRITTEN = "can be written as: safetensors, official, huggingface"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--format", "onnx"], WRITTEN),
        (["--format", "adapter"], WRITTEN),
        (["--merge"], "is for fine-tuned weights with low-rank updates"),
    ],
)
def test_what_needs_a_classifier_is_refused(run, tmp_path, capsys, words, told):
    dest = tmp_path / {"onnx": "x.onnx", "adapter": "x.safetensors"}.get(words[-1], "x")
    assert export.main([str(run), str(dest), *words]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_reconstruct_prints_numbers_and_draws(run, tmp_path):
    """As a user starts it: the script, from another folder."""
    words = [str(run), shards(run), "--clips", "12", "--pictures", "3", "--out", str(tmp_path / "seen.png")]
    printed = train([ROOT / "launch" / "reconstruct.py", *words], 1, tmp_path)
    assert "16 clips" in printed  # rounded up to forward passes of 8
    numbers = [float(line.split()[0]) for line in printed.splitlines() if line.startswith("    0.")]
    assert len(numbers) == 4 and all(0 < number < 1 for number in numbers)
    width, height = Image.open(tmp_path / "seen.png").size
    assert width > 8 * 32 and height > 9 * 32  # 8 frames; 3 clips in 3 rows each
    assert (tmp_path / "seen.gif").is_file()


def test_reconstruct_gives_the_same_numbers_again(run, tmp_path, capsys):
    words = [str(run), shards(run), "--clips", "8", "--out", str(tmp_path / "seen")]
    assert reconstruct.main(words) == 0
    first = capsys.readouterr().out
    assert reconstruct.main(words) == 0
    assert capsys.readouterr().out == first


def test_a_missing_run_is_one_line(tmp_path, capsys):
    assert reconstruct.main([str(tmp_path / "nowhere"), str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("reconstruct: ")


def test_a_run_can_start_from_the_weights_of_another(toy, run):
    """run.init_weights takes a run folder as well as a file, sharded or not."""
    frozen = ["optim.base_lr=1e-12", "optim.base_min_lr=1e-13", "schedule.max_steps=1", "run.seed=5"]
    toy.train("second", f"run.init_weights={run}", *frozen)
    one, other = load_trained(run).objective.model, load_trained(toy.folder / "second").objective.model
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(first, second, rtol=0, atol=1e-9)
