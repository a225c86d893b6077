"""Frozen towers: no part of what is trained or saved, loaded once from where the recipe says, known by their hash."""

import functools
import http.server
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from pretrain.errors import CheckpointError, WeightsError
from pretrain.models.clip import Config, TextTower, VisualTower
from pretrain.models.clip_weights import frozen_clip
from pretrain.models.frozen import Frozen, check_frozen, frozen_notes, locate
from pretrain.runtime.tensors import weights_digest
from tests import forge
from tests.models.frozen_program import CONFIG, SIZES, STAGES, given, state_of
from tests.ranks import environment, outputs_of


@pytest.fixture
def weights(tmp_path: Path) -> str:
    safetensors.torch.save_file(state_of(0), tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


class Objective(nn.Module):
    def __init__(self, tower: Frozen[Any]) -> None:
        super().__init__()
        self.tower = tower
        self.model = nn.Linear(12, 12)


def test_no_part_of_the_objective(weights: str) -> None:
    objective = Objective(frozen_clip("objective.tower.weights", weights, CONFIG, VisualTower))
    output = objective.train().tower(torch.randn(2, 3, 16, 16))
    assert output.shape == (2, 12) and not output.requires_grad and output.dtype == torch.bfloat16
    assert list(objective.state_dict()) == ["model.weight", "model.bias"]
    assert [name for name, _ in objective.named_modules()] == ["", "model"]
    tower = objective.tower.module()
    assert not any(module.training for module in tower.modules())
    assert {(value.requires_grad, value.dtype) for value in tower.parameters()} == {(False, torch.bfloat16)}
    objective.double().train()
    assert next(tower.parameters()).dtype == torch.bfloat16 and not tower.training


def test_built_once_and_only_when_asked(weights: str, caplog: pytest.LogCaptureFixture) -> None:
    built = []

    def build() -> VisualTower:
        built.append(None)
        torch.rand(7)
        return VisualTower(CONFIG)

    from pretrain.models.clip_weights import load_clip

    tower = Frozen("objective.tower.weights", weights, build, load_clip, "fp32")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert built == []
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            tower(torch.ones(1, 3, 16, 16))
    assert len(built) == 1 and torch.equal(before, torch.get_rng_state()), "nobody else's draws change"
    assert sum("tower: " in line and "frozen, in fp32" in line for line in caplog.messages) == 1


def test_gradient_may_flow_through(weights: str) -> None:
    tower = frozen_clip("objective.tower.weights", weights, CONFIG, VisualTower, "fp32")
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    tower.module()(images).square().sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0
    assert all(value.grad is None for value in tower.module().parameters())


def test_memory_is_known_without_the_weights() -> None:
    tower = frozen_clip("objective.tower.weights", "/nowhere", CONFIG, dtype="bf16")
    footprint, count = tower.footprint(), sum(value.numel() for value in state_of(0).values())
    assert footprint.parameters == count and footprint.bytes == 2 * count
    assert footprint.remark == f"{count:,} parameters in bf16: frozen, whole on each rank"
    assert frozen_clip("a.b", "/nowhere", CONFIG, TextTower, "fp32").footprint().bytes < 4 * count


def test_whole_where_the_rest_is_built_on_the_meta_device(weights: str) -> None:
    with torch.device("meta"):
        tower = frozen_clip("objective.tower.weights", weights, CONFIG, VisualTower)
        tower.load()
        assert nn.Linear(2, 2).weight.is_meta
    assert not any(value.is_meta for value in tower.module().parameters())


@pytest.mark.parametrize("name", ["openai/clip-vit-base-patch16", "/nowhere/clip.pt", "memory://nowhere/clip.pt"])
def test_missing_weights_are_refused(name: str) -> None:
    """Also where the name is one of the hub's: nothing is downloaded unasked."""
    tower = frozen_clip("objective.tower.weights", name, CONFIG)
    with pytest.raises(WeightsError) as raised:
        tower.load()
    for expected in (f"objective.tower.weights={name}: no such file or folder", "hub:owner/name", "unasked"):
        assert expected in str(raised.value)


def test_weights_of_another_size_name_the_key(weights: str) -> None:
    with pytest.raises(WeightsError, match=r"(?s)objective.tower.weights=.*mismatched: visual.embed.positions"):
        frozen_clip("objective.tower.weights", weights, Config(**{**SIZES, "image_size": 32})).load()


def test_hash_is_of_the_values(weights: str, tmp_path: Path) -> None:
    """Whatever file, layout and format: another hash means other weights."""
    tower = frozen_clip("objective.tower.weights", weights, CONFIG)
    torch.save({"model": {f"module.{key}": value for key, value in state_of(0).items()}}, tmp_path / "same.pth")
    same = frozen_clip("objective.tower.weights", str(tmp_path / "same.pth"), CONFIG, dtype="fp32")
    torch.save(state_of(1), tmp_path / "other.pth")
    other = frozen_clip("objective.tower.weights", str(tmp_path / "other.pth"), CONFIG)
    assert tower.digest == same.digest == weights_digest(state_of(0)) != other.digest


def test_resume_with_other_weights_is_refused(weights: str, tmp_path: Path) -> None:
    torch.save(state_of(1), tmp_path / "other.pth")
    torch.save(state_of(0), tmp_path / "moved.pth")
    noted = json.loads(json.dumps(frozen_notes({"tower": frozen_clip("objective.tower.weights", weights, CONFIG)})))
    moved, other = (
        frozen_clip("objective.tower.weights", str(tmp_path / name), CONFIG) for name in ("moved.pth", "other.pth")
    )
    check_frozen({"tower": moved}, noted, "step_00000004")
    with pytest.raises(CheckpointError) as raised:
        check_frozen({"tower": other, "added": moved}, noted, "step_00000004")
    for expected in ("step_00000004", f"trained with {noted['tower']['digest']}", weights, "added: in this recipe"):
        assert expected in str(raised.value)
    with pytest.raises(CheckpointError, match="tower: noted there, not in this recipe"):
        check_frozen({}, noted, "step_00000004")


class Hub(http.server.SimpleHTTPRequestHandler):
    """As much of the hub as its client asks for: owner/name/resolve/<revision>/<file>."""

    def log_message(self, *_: Any) -> None:
        pass

    def send_head(self) -> Any:
        parts = self.path.split("?")[0].split("/")
        if parts[1:3] == ["owner", "tiny"] and len(parts) == 6 and parts[3] == "resolve":
            self.path = f"/{parts[5]}"
            if (Path(self.directory) / parts[5]).exists():  # type: ignore[arg-type]
                return super().send_head()
        missing = "EntryNotFound" if parts[2:3] == ["tiny"] else "RepoNotFound"
        self.send_response(404)
        self.send_header("X-Error-Code", missing)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def end_headers(self) -> None:
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.send_header("ETag", f'"{self.path.strip("/").replace(".", "-")}"')
        super().end_headers()


@pytest.fixture
def hub(weights: str) -> Iterator[str]:
    """A server on loopback that the hub's client takes for the hub; it has owner/tiny."""
    handler = functools.partial(Hub, directory=str(Path(weights).parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


HUB_PROGRAM = """
import os, sys
from pretrain.errors import WeightsError
from pretrain.models.frozen import locate
for name in sys.argv[1:]:
    try:
        place = locate("objective.tower.weights", name)
        print("FOUND", place, *sorted(os.listdir(place)))
    except WeightsError as error:
        print("ERROR", error)
"""


def ask_hub(cache: Path, names: list[str], **more: str) -> list[str]:
    variables = environment() | {"HF_HUB_CACHE": str(cache)} | more
    variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
    (printed,) = outputs_of([forge.start(["-c", HUB_PROGRAM, *names], variables)])
    return [line for line in printed.splitlines() if line.startswith(("FOUND", "ERROR"))]


def test_hub_is_asked_where_the_recipe_says_so(hub: str, weights: str, tmp_path: Path) -> None:
    """The real client against a server on loopback; afterwards its copy does, without a network."""
    cache, folder = tmp_path / "cache", Path(weights).parent
    (folder / "config.json").write_text("{}")
    names = ["hub:owner/tiny", "hub:owner/other", "hub:a/b/c"]
    found, unknown, wrong = ask_hub(cache, names, HF_ENDPOINT=hub)
    place = Path(found.split()[1])
    assert found.startswith("FOUND") and found.endswith("config.json model.safetensors") and cache in place.parents
    assert (place / "model.safetensors").read_bytes() == Path(weights).read_bytes()
    assert "hub:owner/other: the hub refuses (RepositoryNotFoundError)" in unknown and "hf download" in unknown
    assert "hub:a/b/c: the hub refuses" in wrong
    offline = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HUB_OFFLINE": "1"}
    again, never = ask_hub(cache, ["hub:owner/tiny", "hub:owner/never"], **offline)
    assert again == found
    assert "hub:owner/never: the hub can't be reached, and no earlier copy is here" in never


def test_weights_in_parts_are_fetched_whole(hub: str, weights: str, tmp_path: Path) -> None:
    """A copy that was cut short is no copy."""
    cache, folder = tmp_path / "cache", Path(weights).parent
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    found = ask_hub(cache, ["hub:owner/tiny@main"], HF_ENDPOINT=hub)[0]
    assert found.endswith("a.safetensors config.json model.safetensors.index.json")
    (Path(found.split()[1]) / "a.safetensors").unlink()
    again = ask_hub(cache, ["hub:owner/tiny@main"], HF_ENDPOINT="http://127.0.0.1:1", HF_HUB_OFFLINE="1")[0]
    assert "can't be reached" in again


def test_hub_is_not_asked_elsewhere(weights: str) -> None:
    assert locate("objective.tower.weights", weights) == weights


@pytest.mark.parametrize("stage", STAGES)
def test_under_deepspeed(stage: int, in_engines: Callable[[str], dict[tuple[int, int], Any]]) -> None:
    for both in in_engines("tests.models.frozen_program").values():
        found = both[stage]
        assert found["parameters"] == found["state"] == ["model.weight", "model.bias"]
        student = 3 * 16 * 16 * 12 + 12
        assert found["optimised"] == student
        assert not found["sharded"] and not found["gradients"] and not found["training"]
        assert found["held"] == "Parameter" and found["dtypes"] == ["torch.float32"], "not rounded with the student"
        assert found["losses"][1] < found["losses"][0]
        assert found["files"] and max(found["files"].values()) <= student + 4


def test_outputs_under_deepspeed_are_those_of_the_towers_alone(
    weights: str, in_engines: Callable[[str], dict[tuple[int, int], Any]]
) -> None:
    towers = (VisualTower, TextTower)
    plain = [
        frozen_clip("a.b", weights, CONFIG, tower, "fp32")(one) for tower, one in zip(towers, given(), strict=True)
    ]
    for both in in_engines("tests.models.frozen_program").values():
        for outputs in both[1]["outputs"] + both[3]["outputs"]:
            for said, expected in zip(outputs, plain, strict=True):
                torch.testing.assert_close(said, expected, rtol=1e-6, atol=1e-6)
        for name, prefix in (("teacher", "visual."), ("text", "text.")):
            part = {key.removeprefix(prefix): value for key, value in state_of(0).items() if key.startswith(prefix)}
            expected = {"weights": both["weights"], "digest": weights_digest(part)}
            assert both[1]["notes"][name] == both[3]["notes"][name] == expected
