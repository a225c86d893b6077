"""Adapter files and several adapters on one backbone."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from finetune.adapters.adapter_files import load_adapter, read_adapter, save_adapter
from finetune.adapters.attach import apply_tuning
from finetune.adapters.bank import AdapterBank
from finetune.adapters.config import AdaptFormer, LowRank, Prompts, Tune
from pretrain.errors import RecipeError, WeightsError

TUNES = {
    "linear": Tune("linear"),
    "adaptformer": Tune("adaptformer", adaptformer=AdaptFormer(4, "sequential", "in", learned_scale="scalar")),
    "vpt": Tune("vpt", vpt=Prompts(2)),
    "lora": Tune("lora", lora=LowRank(2)),
    "bitfit": Tune("bitfit"),
}


def train(model, tune: Tune, inputs: torch.Tensor, steps: int = 3) -> None:
    """A few steps of the tuned parameters, so that nothing is at its start."""
    names = apply_tuning(model, tune)
    optimizer = torch.optim.SGD([model.get_parameter(name) for name in names], lr=0.5)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs + step), torch.tensor([0, 1, 1, 0])).backward()
        optimizer.step()
    model.eval()


@pytest.fixture
def files(make, example, tmp_path):
    """An adapter of each method with its outputs, all trained on the same backbone."""
    found = {}
    for index, (name, tune) in enumerate(TUNES.items()):
        model = make(classes=2 + index)
        model.load_state_dict({**model.state_dict(), **backbone_of(make())})
        inputs = example(model)
        train(model, tune, inputs)
        path = str(tmp_path / f"{name}.safetensors")
        save_adapter(model, tune, path)
        found[name] = (path, model(inputs).detach())
    return found


def backbone_of(model) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}


@pytest.mark.parametrize("name", TUNES)
def test_round_trip_on_a_fresh_backbone(make, example, files, name: str) -> None:
    path, expected = files[name]
    model = make(classes=9)
    assert load_adapter(model, path) == TUNES[name]
    assert torch.equal(model.eval()(example(model)), expected)


def test_only_what_was_trained_is_stored(make, files) -> None:
    stored = set(load_file(files["adaptformer"][0]))
    assert {"head.0.running_mean", "head.0.running_var", "head.1.weight"} <= stored
    assert all(name.startswith(("head.", "fc_norm.")) or ".adaptmlp." in name for name in stored)


def test_another_backbone_is_refused(make, files) -> None:
    with pytest.raises(WeightsError, match="another backbone"):
        load_adapter(make(seed=1), files["vpt"][0])
    load_adapter(make(seed=1), files["vpt"][0], any_backbone=True)


def test_backbone_in_bfloat16_is_the_same_backbone(make, files) -> None:
    load_adapter(make().bfloat16(), files["adaptformer"][0])


def test_full_has_no_adapter_and_other_files_are_none(make, tmp_path, files) -> None:
    model = make()
    with pytest.raises(RecipeError, match="full"):
        save_adapter(model, Tune("full"), str(tmp_path / "full"))
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(WeightsError, match="safetensors"):
        read_adapter(str(tmp_path / "text"))


def test_switching(make, example, files) -> None:
    model = make().eval()
    inputs = example(model)
    plain = model(inputs)
    state = copy.deepcopy(model.state_dict())
    bank = AdapterBank(model)
    for name, (path, _) in files.items():
        bank.add(name, path)
    for name in ("vpt", "bitfit", "adaptformer", "lora", "vpt", "linear", "bitfit"):
        bank.use(name)
        assert torch.equal(model.eval()(inputs), files[name][1]), name
    bank.use("")
    assert torch.equal(model(inputs), plain)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(RecipeError, match="vpt"):
        bank.use("nothing")


def test_a_refused_file_leaves_the_bank_as_it_was(make, example, files) -> None:
    model = make(seed=1).eval()
    before = model(example(model))
    bank = AdapterBank(model)
    with pytest.raises(WeightsError):
        bank.add("vpt", files["vpt"][0])
    assert bank.names == [] and torch.equal(model(example(model)), before)


@pytest.mark.parametrize("change", [{"tune": None}, {"tune": '{"method": "lora", "later": 3}'}, {"tune": "{"}])
def test_a_header_that_can_t_be_read(files, tmp_path, change: dict[str, str | None]) -> None:
    path, _ = files["lora"]
    with safe_open(path, "pt") as opened:
        header = {name: value for name, value in (opened.metadata() | change).items() if value is not None}
    save_file(load_file(path), tmp_path / "other.safetensors", header)
    with pytest.raises(WeightsError, match="header can't be read"):
        read_adapter(str(tmp_path / "other.safetensors"))
