"""Frozen backbones under ZeRO stage 3: built partitioned, loaded, tuned; the same losses as on one plain model."""

import json
from pathlib import Path

import pytest
import torch

from pretrain.models.classifier import Config, VideoClassifier
from pretrain.models.keep_rates import Reorganisation
from tests.ranks import run_ranks

PROGRAM = """
import json, sys
import deepspeed
import torch
from torch.nn import functional as F
from finetune.adapters.attach import apply_tuning
from finetune.adapters.config import AdaptFormer, LowRank, Prompts, Tune
from pretrain.models.classifier import Config, VideoClassifier
from pretrain.models.classifier_weights import load_pretrained
from pretrain.models.keep_rates import Reorganisation
from pretrain.runtime.process_group import join

TUNES = {
    "adaptformer": Tune("adaptformer", adaptformer=AdaptFormer(4, init="released", learned_scale="scalar")),
    "vpt": Tune("vpt", vpt=Prompts(2)),
    "lora": Tune("lora", lora=LowRank(2)),
    "full": Tune("full"),
    "dropping": Tune("full"),
}
SETTINGS = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}


def steps(model, method, partitioned):
    load_pretrained(model, sys.argv[1])
    torch.manual_seed(1)
    apply_tuning(model, TUNES[method])
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    engine = model
    if partitioned:
        engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)
    losses = []
    for step in range(3):
        video = torch.randn(4, 4, 16, 16, 3, generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(engine(video), torch.tensor([0, 1, 2, 0]))
        if partitioned:
            engine.backward(loss)
            engine.step()
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    if partitioned:
        assert all(hasattr(value, "ds_id") for value in model.parameters()), "not partitioned"
        engine.destroy()
    return losses


join()
config = Config(**json.loads(sys.argv[2]))
found = {}
for method in TUNES:
    config.tokens = Reorganisation(0.5 if method == "dropping" else 1.0)
    plain = steps(VideoClassifier(config, 4, 16, 16), method, False)
    with deepspeed.zero.Init(config_dict_or_path=SETTINGS):
        model = VideoClassifier(config, 4, 16, 16)
    found[method] = plain, steps(model, method, True)

# In bf16: the frozen backbone has no second copy, and the optimiser knows the trained parameters only.
settings = SETTINGS | {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
with deepspeed.zero.Init(config_dict_or_path=settings):
    model = VideoClassifier(config, 4, 16, 16)
load_pretrained(model, sys.argv[1])
apply_tuning(model, TUNES["adaptformer"])
trained = [value for value in model.parameters() if value.requires_grad]
optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
video = torch.randn(4, 4, 16, 16, 3, generator=torch.Generator().manual_seed(0))
engine.backward(F.cross_entropy(engine(video).float(), torch.tensor([0, 1, 2, 0])))
engine.step()
frozen = [value for value in model.parameters() if not value.requires_grad]
states = {
    "frozen": sum(value.ds_numel for value in frozen),
    "dtypes": sorted({str(value.ds_tensor.dtype) for value in frozen}),
    "trained": sum(value.ds_numel for value in trained),
    "masters": sum(value.numel() for value in optimizer.fp32_partitioned_groups_flat),
    "gradients": sum(value.grad is not None for value in frozen),
}
print("STATES", json.dumps(states))
print("FOUND", json.dumps(found))
"""
SIZES = {"size": "custom", "patch_size": 4, "dim": 24, "depth": 4, "heads": 3, "mlp_ratio": 2.0, "drop_path": 0.0}
SIZES |= {"classes": 3, "positions": "rebuild"}


def test_losses_equal_those_of_the_plain_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VideoClassifier(Config(**SIZES, tokens=Reorganisation()), 4, 16, 16)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.2)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [tmp_path / "program.py", tmp_path / "weights.pth", json.dumps(SIZES)]
    (output,) = run_ranks(words, 1, timeout_s=500)
    states = json.loads(next(line for line in output.splitlines() if line.startswith("STATES"))[7:])
    assert states["dtypes"] == ["torch.bfloat16"] and states["frozen"] > 10 * states["trained"]
    assert states["masters"] == states["trained"] and states["gradients"] == 0
    line = next(line for line in output.splitlines() if line.startswith("FOUND"))
    for method, (plain, partitioned) in json.loads(line.removeprefix("FOUND")).items():
        assert partitioned == pytest.approx(plain, rel=1e-6), method
        assert plain[-1] != plain[0]
