"""The model built under `deepspeed.zero.Init` (ZeRO stage 3): initialised, exact positions, trainable, loadable."""

from pathlib import Path

from pretrain.models.formats import export_official
from pretrain.models.videomae import Config, VideoMAE
from tests.ranks import run_ranks

SIZES = {
    "size": "custom",
    "patch_size": 4,
    "dim": 32,
    "depth": 2,
    "heads": 2,
    "mlp_ratio": 2.0,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
}

PROGRAM = """
import sys
import deepspeed
import torch
from pretrain.models.positions import sinusoid_table
from pretrain.models.videomae import Config, VideoMAE
from pretrain.models.weights import load_weights
from pretrain.objectives.videomae import MEAN, VideoMAEObjective
from pretrain.errors import WeightsError
from pretrain.models.formats import plain_state
from pretrain.runtime.process_group import join
from tests_sizes import SIZES

join()
settings = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_force_ds_cpu_optimizer": False,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}
with deepspeed.zero.Init(config_dict_or_path=settings):
    objective = VideoMAEObjective(VideoMAE(Config(**SIZES), 4, 16, 16))
model = objective.model
assert all(value.numel() == 0 for value in model.parameters()), "not partitioned"
for value in (model.encoder.blocks[0].attn.qkv.weight, model.decoder.head.weight, model.mask_token):
    with deepspeed.zero.GatheredParameters([value]):
        assert value.float().std() > 0.005, "not initialised"
assert torch.equal(model.encoder.positions.table, sinusoid_table(32, 32)), "positions were rounded"
assert objective.normalization.mean.tolist() == torch.tensor(MEAN).tolist(), "ImageNet's mean was rounded"
assert {value.dtype for value in objective.buffers()} == {torch.float32}
report = load_weights(model, sys.argv[1])
assert len(report.matched) == len(list(model.parameters()))
try:
    plain_state(model)
except WeightsError:
    pass
else:
    raise SystemExit("exported a partitioned model")

engine, *_ = deepspeed.initialize(model=objective, config=settings)
index = torch.arange(32)[None]
seen = index.remainder(16) < 4
batch = {
    "video": torch.randint(0, 256, (1, 4, 16, 16, 3), dtype=torch.uint8),
    "visible": index[seen][None], "targets": index[~seen][None], "weight": torch.ones(1, 24),
}
losses = []
for _ in range(4):
    output = engine(batch)
    engine.backward(output.loss)
    engine.step()
    losses.append(output.loss.item())
engine.eval()
assert engine.module.pictures(batch)["reconstructed"].shape == (1, 4, 16, 16, 3)
print("losses", *losses)
"""


def test_under_zero_stage_3(tmp_path: Path) -> None:
    export_official(VideoMAE(Config(**SIZES), 4, 16, 16), str(tmp_path / "weights.pth"))
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "tests_sizes.py").write_text(f"SIZES = {SIZES!r}\n")
    (output,) = run_ranks([tmp_path / "program.py", tmp_path / "weights.pth"], 1)
    losses = [float(word) for line in output.splitlines() if line.startswith("losses") for word in line.split()[1:]]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.05
