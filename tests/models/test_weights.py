"""Weights in and out: layouts, strictness, reports, exports."""

import argparse
import json
import logging
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.testing import assert_close

from pretrain.errors import WeightsError
from pretrain.models.formats import export_huggingface, export_official, export_safetensors, infer_config, mlp_ratio
from pretrain.models.huggingface import from_official, to_official
from pretrain.models.videomae import Config, VideoMAE
from pretrain.models.weights import load_weights, read_state
from pretrain.recipe.schema import Recipe
from pretrain.runtime.vision_ops import ensure_torchvision

SIZES = {
    "size": "custom",
    "patch_size": 4,
    "dim": 24,
    "depth": 2,
    "heads": 3,
    "mlp_ratio": 2.0,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
}


def build(seed: int = 0, **options) -> VideoMAE:
    """A small model; no parameter is zero, so that a lost one shows."""
    torch.manual_seed(seed)
    model = VideoMAE(Config(**(SIZES | options)), 4, 16, 16)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.1)
    return model


def assert_equal(model: VideoMAE, other: VideoMAE) -> None:
    for name, value in model.state_dict().items():
        assert_close(other.state_dict()[name], value, rtol=0, atol=0, msg=name)


def old_names(state: dict) -> dict:
    return {
        key.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): value
        for key, value in from_official(state).items()
    }


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=1e-3, size=(16, 16))},
        lambda state: {"module": state, "optimizer": {"state": {}}},
        lambda state: {"model": {f"_orig_mod.{key}": value for key, value in state.items()}},
        lambda state: {"module": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {"state_dict": {f"module._orig_mod.model.{key}": value for key, value in state.items()}},
        from_official,
        old_names,
    ],
    ids=["plain", "model", "module", "compiled", "ddp", "all wrappers", "new hugging face", "old hugging face"],
)
def test_every_layout_loads(wrap, tmp_path: Path) -> None:
    source, model = build(0), build(1)
    torch.save(wrap(source.state_dict()), tmp_path / "checkpoint.pth")
    report = load_weights(model, str(tmp_path / "checkpoint.pth"))
    assert_equal(source, model)
    assert len(report.matched) == len(source.state_dict())
    assert not (report.missing or report.unexpected or report.reshaped or report.mismatched)
    assert report.layout == ("Hugging Face" if wrap in (from_official, old_names) else "official")


def test_half_precision_is_cast_to_the_models_type(tmp_path: Path) -> None:
    source, model = build(0), build(1)
    torch.save({"module": {k: v.half() for k, v in source.state_dict().items()}}, tmp_path / "a.pth")
    load_weights(model, str(tmp_path / "a.pth"))
    assert_close(model.mask_token, source.mask_token.half().float())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda state: state.pop("decoder.head.bias"), "missing: decoder.head.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda state: state["mask_token"][0, 0, 3:].fill_(float("nan")), r"not finite: mask_token \(\d+ of"),
        (lambda state: state["decoder.head.bias"][1].fill_(float("-inf")), r"not finite: decoder.head.bias \(1 of"),
        (lambda state: state.update(mask_token=torch.zeros(1, 1, 8)), r"mask_token \[1, 1, 8\] in the file"),
    ],
)
def test_partial_loads_are_refused_and_change_nothing(change, word: str, tmp_path: Path) -> None:
    state, model, before = build(0).state_dict(), build(1), build(1)
    change(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=word):
        load_weights(model, str(tmp_path / "a.pth"))
    assert_equal(before, model)


def test_named_keys_may_be_missing_or_ignored(tmp_path: Path) -> None:
    source, model, before = build(0), build(1), build(1)
    state = {key: value for key, value in source.state_dict().items() if not key.startswith("decoder.")}
    torch.save(state | {"head.weight": torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="unexpected: head.weight"):
        load_weights(model, str(tmp_path / "a.pth"), allow_missing=["decoder.*"])
    report = load_weights(model, str(tmp_path / "a.pth"), allow_missing=["decoder.*"], allow_unexpected=["head.*"])
    assert report.unexpected == ["head.weight"] and all(key.startswith("decoder.") for key in report.missing)
    assert f"missing: {len(report.missing)} (decoder.blocks.0" in str(report)
    assert_close(model.decoder.head.weight, before.decoder.head.weight)
    assert_close(model.encoder.norm.weight, source.encoder.norm.weight)


def test_axes_of_size_one_are_reshaped_and_reported(tmp_path: Path) -> None:
    source, model = build(0, cosine_attention=True), build(1, cosine_attention=True)
    flat = {key: value.flatten() if key.endswith(".scale") else value for key, value in source.state_dict().items()}
    safetensors.torch.save_file(flat, tmp_path / "a.safetensors")
    report = load_weights(model, str(tmp_path / "a.safetensors"))
    assert len(report.reshaped) == 3 and all(key.endswith(".scale") for key in report.reshaped)
    assert_equal(source, model)


@pytest.mark.parametrize("spelling", [from_official, old_names])
def test_a_hugging_face_file_without_biases_is_refused(spelling, tmp_path: Path) -> None:
    """transformers itself has read such files as zeros, silently."""
    state = spelling(build(0).state_dict())
    lost = {key: value for key, value in state.items() if not key.endswith(("q_bias", "query.bias"))}
    safetensors.torch.save_file(lost, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="missing: encoder.blocks.0.attn.q_bias"):
        load_weights(build(1), str(tmp_path / "a.safetensors"))


def test_hugging_face_oddities_are_named() -> None:
    state = from_official(build(0).state_dict())
    twice = state | {"videomae.encoder.layer.0.attention.attention.q_bias": torch.zeros(24)}
    with pytest.raises(WeightsError, match="second spelling"):
        to_official(twice)
    state.pop("videomae.encoder.layer.1.attention.attention.key.weight")
    with pytest.raises(WeightsError, match=r"encoder.blocks.1.*key missing in the file beside query, value"):
        to_official(state)


class Attack:
    """Runs a command when unpickled."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_code_in_a_checkpoint_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": build(0).state_dict(), "args": Attack()}, "a.pth")
    with pytest.raises(WeightsError, match="code from files is never run"):
        read_state("a.pth")
    assert not Path("attacked").exists()


@pytest.mark.parametrize(("name", "content"), [("a.pth", b"no weights"), ("a.safetensors", b"no weights"), ("b", b"")])
def test_unreadable_files_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=name):
        read_state(str(tmp_path / name))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        read_state(str(tmp_path / "nothing.pth"))
    with pytest.raises(WeightsError, match="model.safetensors"):
        read_state(str(tmp_path))
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="no state dict"):
        read_state(str(tmp_path / "a.pth"))


def test_the_meta_device_is_refused(tmp_path: Path) -> None:
    export_official(build(0), str(tmp_path / "a.pth"))
    with torch.device("meta"):
        model = VideoMAE(Config(**SIZES), 4, 16, 16)
    with pytest.raises(WeightsError, match="meta device"):
        load_weights(model, str(tmp_path / "a.pth"))


def test_official_export_comes_back_on_any_storage(tmp_path: Path) -> None:
    for dest in (str(tmp_path / "folder" / "a.pth"), "memory://exports/a.pth"):
        source, model = build(0), build(1)
        export_official(source, dest)
        load_weights(model, dest)
        assert_equal(source, model)
    content = torch.load(tmp_path / "folder" / "a.pth", weights_only=True)
    assert list(content) == ["model"] and set(content["model"]) == set(source.state_dict())


def test_safetensors_export_comes_back_with_its_recipe(tmp_path: Path) -> None:
    source, model = build(0), build(1)
    export_safetensors(source, Recipe(model=source.config, objective={"name": "videomae"}), str(tmp_path / "out"))
    load_weights(model, str(tmp_path / "out"))
    assert_equal(source, model)
    text = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "decoder_dim: 16" in text and "base_lr" in text


def test_sharded_folders_are_read_whole(tmp_path: Path) -> None:
    source, model = build(0), build(1)
    items = list(old_names(source.state_dict()).items())
    parts = {"model-1.safetensors": dict(items[::2]), "model-2.safetensors": dict(items[1::2])}
    for name, part in parts.items():
        safetensors.torch.save_file({key: value.contiguous() for key, value in part.items()}, tmp_path / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    load_weights(model, str(tmp_path))
    assert_equal(source, model)


def test_heads_that_contradict_config_json_are_refused(tmp_path: Path) -> None:
    """Any number of heads fits the weights and would change the results."""
    export_huggingface(build(0), str(tmp_path))
    with pytest.raises(WeightsError, match="num_attention_heads=3, the model has 4"):
        load_weights(build(1, heads=4), str(tmp_path))
    # The file itself named: what lies beside it says the same.
    with pytest.raises(WeightsError, match="num_attention_heads=3, the model has 4"):
        load_weights(build(1, heads=4), str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_config_json_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    export_huggingface(build(0), str(tmp_path))
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match="config.json: (not valid JSON|found a list, allowed: a JSON object)"):
        load_weights(build(1), str(tmp_path / "model.safetensors"))


def test_a_config_json_says_nothing_of_other_models(tmp_path: Path) -> None:
    """Such as Hugging Face folders have, with an epsilon and sizes; a user's own model has neither."""
    model = nn.Linear(3, 2)
    model.shape = SimpleNamespace(patch_size=4)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"layer_norm_eps": 1e-12, "patch_size": 16}))
    assert load_weights(model, str(tmp_path)).matched == ["weight", "bias"]


def test_other_epsilons_are_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export_huggingface(build(0), str(tmp_path))
    with caplog.at_level(logging.WARNING):
        load_weights(build(1, decoder_norm_eps=1e-5), str(tmp_path))
        assert not caplog.records
        load_weights(build(1), str(tmp_path))
    assert "decoder_norm_eps" in caplog.text


@pytest.mark.parametrize("option", [{"cosine_attention": True}, {"layer_scale": 0.1}])
def test_what_hugging_face_cannot_express_is_not_exported(option: dict, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="knows no"):
        export_huggingface(build(0, **option), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_transformers_predicts_the_same(tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5")
    ensure_torchvision()
    from transformers import VideoMAEForPreTraining

    model = build(0, decoder_norm_eps=1e-5)
    export_huggingface(model, str(tmp_path / "ours"))
    theirs, report = VideoMAEForPreTraining.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    video = torch.randn(2, 4, 3, 16, 16)
    hidden = torch.zeros(2, 32, dtype=torch.bool)
    hidden[:, torch.randperm(32)[:24]] = True
    index = [torch.stack([torch.nonzero(row == value)[:, 0] for row in hidden]) for value in (False, True)]
    from pretrain.models.cubes import cut_cubes, take_tokens

    cubes = take_tokens(cut_cubes(video.movedim(2, -1), 2, 4), index[0])
    assert_close(model(cubes, *index), theirs.eval()(video, bool_masked_pos=hidden).logits, rtol=1e-4, atol=2e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = build(1, decoder_norm_eps=1e-5)
    load_weights(back, str(tmp_path / "theirs"))
    assert_equal(model, back)


@pytest.mark.parametrize(
    "options",
    [
        {"size": "small"},
        {"size": "large", "decoder_depth": 12, "depth": 1},
        {"size": "huge", "decoder_dim": 640, "depth": 1},
        {"size": "giant", "depth": 1, "decoder_depth": 1},
        SIZES | {"cosine_attention": True, "layer_scale": 1.0},
    ],
)
def test_a_configuration_is_found_in_the_weights(options: dict) -> None:
    config = Config(**options)
    patch = 14 if config.size == "giant" else 4 if config.size == "custom" else 16
    with torch.device("meta"):
        model = VideoMAE(config, 4, 4 * patch, 4 * patch)
        found = VideoMAE(infer_config(model.state_dict()), 4, 4 * patch, 4 * patch)
    assert found.shape == model.shape
    shapes = [{name: value.shape for name, value in built.named_parameters()} for built in (model, found)]
    assert shapes[0] == shapes[1]


def test_a_ratio_is_found_for_any_hidden_channels() -> None:
    """Plain division misses some by rounding: int(11 * (15 / 11)) is 14."""
    for dim in range(1, 60):
        for hidden in range(1, 4 * dim):
            assert int(dim * mlp_ratio(dim, hidden)) == hidden
    assert mlp_ratio(512, 2234) == mlp_ratio(1408, 6144) == 48 / 11


def test_heads_that_nobody_knows_must_be_given() -> None:
    state = build(0).state_dict()
    with pytest.raises(WeightsError, match="heads"):
        infer_config(state)
    assert infer_config(state, heads=3, decoder_heads=2).heads == 3
    with pytest.raises(WeightsError, match="not VideoMAE pre-training weights"):
        infer_config({"fc.weight": torch.zeros(2, 2)})


WHOLE = "whole"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5\nsize 3", "git lfs pull"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5\nsize 3", "git lfs pull"),
        ("a.pth", b"\n<!DOCTYPE html><html><title>Sign in", "a web page"),
        ("a.pth", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "answer of a server"),
        ("a.safetensors", b'{"weight_map": {}}', "JSON"),
        ("a.pth", b"\x1f\x8b\x08\0\0", "gzip"),
        ("a.pth", b"", "an empty file"),
        ("a.pth", b"\x80\x04nonsense", "damaged, or no file of torch"),
        ("a.pth", WHOLE, "cut, with 30000 bytes"),
        ("a.safetensors", WHOLE, "cut, with 30000 bytes"),
    ],
)
def test_files_that_are_no_weights_are_named(name: str, content: bytes | str, told: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content == WHOLE:
        state = {"a": torch.ones(100, 100)}
        torch.save(state, path) if name.endswith(".pth") else safetensors.torch.save_file(state, path)
        content = path.read_bytes()[:30000]
    assert isinstance(content, bytes)
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=told) as error:
        read_state(str(path))
    assert not re.search("weights_only|add_safe_globals|trust the source|Re-running", str(error.value)), error.value


def test_a_folder_of_deepspeed_is_named_with_its_script(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("global_step10")
    with pytest.raises(WeightsError, match="zero_to_fp32.py . weights"):
        read_state(str(tmp_path))


def test_prefixes_and_tables_of_others_are_pointed_out(tmp_path: Path) -> None:
    state = {f"net.backbone.{key}": value for key, value in build(0).state_dict().items()}
    state |= {"criterion.weight": torch.ones(3), "net.backbone.encoder.pos_embed": torch.ones(1, 8, 16)}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.4.0"}, tmp_path / "a.ckpt")
    with pytest.raises(WeightsError, match="are there behind 'net.backbone.': save that part") as error:
        load_weights(build(1), str(tmp_path / "a.ckpt"))
    assert "pos_embed is a stored table of positions" in str(error.value)
