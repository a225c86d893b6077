"""TagAlign: where training begins, what is trained, what is counted or refused, two ranks, and a run that goes on."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from pretrain.commands.tag import main as tag
from pretrain.data.index import load_index, load_members
from pretrain.data.members import Members
from pretrain.data.samples import Place, Sample, SourceInfo
from pretrain.data.tags.tag_folder import list_hash, read_table, read_tags, table_path
from pretrain.engine.optimiser import parameter_groups
from pretrain.errors import DataError, SampleError, WeightsError
from pretrain.models.weight_files import read_raw
from pretrain.objectives.base import method_of, problems_of, warnings_of
from pretrain.objectives.tagalign import TagAlignObjective, tag_losses
from pretrain.plan.trace import trace_step
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Recipe, Source
from pretrain.samples.captioned import CaptionedPictures
from pretrain.trained.load_run import load_trained
from tests.captioned_pictures import drawn, world
from tests.streams import training_stream
from tests.toy_run import Toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory)


def recipe_of(folder: Path, *words: str) -> Recipe:
    return load_recipe(str(folder / "tagalign.yaml"), list(words))


def begun(recipe: Recipe) -> TagAlignObjective:
    torch.manual_seed(1)
    objective = method_of(recipe).build()
    assert isinstance(objective, TagAlignObjective)
    objective.load_pretrained(recipe.run.init_weights, read_raw(recipe.run.init_weights))
    return objective


def samples_of(recipe: Recipe) -> tuple[CaptionedPictures, SourceInfo]:
    shards = recipe.data.sources["toy"].shards
    return CaptionedPictures(recipe.input, 5), SourceInfo("toy", load_index(shards).shards, Source(shards=shards))


def members_of(number: int, caption: str) -> Members:
    import io

    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(drawn(number)[0]).save(target, "PNG")
    return Members({"png": target.getvalue(), "json": json.dumps({"caption": caption}).encode()})


def batch_of(recipe: Recipe, rows: int = 4) -> dict[str, Any]:
    samples, source = samples_of(recipe)
    places = [Place(0, number, 0, 0, number) for number in range(rows)]
    made = [samples(place, source, members_of(place.row, drawn(place.row)[2])) for place in places]
    return samples.collate([Sample(place, str(place.row), one) for place, one in zip(places, made, strict=True)])


def test_training_begins_with_clip_surgery(folder: Path) -> None:
    """Gates are closed and norm and projection copied: the projector's patches are those of CLIP surgery."""
    recipe = recipe_of(folder)
    objective = begun(recipe).eval()
    tower, images = objective.images.module(), objective.pixels(batch_of(recipe)["video"])
    with torch.no_grad():
        patches = tower(images, class_token=False)
        found = objective.model(patches, tower.grid(32, 32))
        assert torch.equal(found, tower.forward_head(patches))
        objective.model.steps[1].gate.fill_(0.5)
        assert not torch.equal(found, objective.model(patches, tower.grid(32, 32)))


def test_a_step_moves_projector_and_scales_and_no_tower(folder: Path) -> None:
    recipe = recipe_of(folder)
    objective, batch = begun(recipe).train(), batch_of(recipe)
    before = {name: value.detach().clone() for name, value in objective.named_parameters()}
    frozen = {name: part.digest for name, part in objective.frozen_parts().items()}
    optimiser = torch.optim.AdamW(parameter_groups(objective, 0.05), lr=1e-2)
    losses = []
    for _ in range(12):  # what stands behind a closed gate moves from the second step on
        optimiser.zero_grad()
        output = objective(batch)
        output.loss.backward()
        optimiser.step()
        losses.append(float(output.loss.detach()))
    still = [name for name, value in objective.named_parameters() if torch.equal(value, before[name])]
    assert not still and losses[-1] < 0.85 * losses[0], (still, losses)
    for name, part in objective.frozen_parts().items():
        assert part.digest == frozen[name]
        assert all(value.grad is None and not value.requires_grad for value in part.module().parameters())
    assert not any(name.startswith(("images.", "texts.", "tags.")) for name in objective.state_dict())
    assert set(output.metrics) == {"cut", "contrast", "contrast_scale", "tag", "tag_scale", "untagged"}


def test_gates_and_scales_decay_as_published(folder: Path) -> None:
    for words, wanted in (((), True), (("objective.decay_scalars=false",), False)):
        objective = begun(recipe_of(folder, *words))
        rules = {name: objective.rule(name, value.shape).decays for name, value in objective.named_parameters()}
        scalars = {name for name in rules if name.endswith(("gate", "logit_scale"))}
        assert len(scalars) == 6 and {rules[name] for name in scalars} == {wanted}
        assert not rules["model.norm.weight"] and not rules["model.steps.0.conv.bias"] and rules["model.head.weight"]


def test_tags_share_the_target() -> None:
    """As torch's cross entropy with probabilities; a tag that is nearly impossible costs log 1e-8 and no more."""
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0], [60.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    tags = torch.tensor([[0, 3, -1], [2, -1, -1], [-1, -1, -1]])
    found = tag_losses(logits, tags)
    target = torch.tensor([[0.5, 0, 0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(found[:1], F.cross_entropy(logits[:1], target, reduction="none"))
    assert found[1].item() == pytest.approx(-np.log(1e-8)) and found[2] == 0


def test_one_loss_can_be_left_out(folder: Path) -> None:
    """Officially no weight on the contrast silently disables both."""
    batch = batch_of(recipe_of(folder))
    both = begun(recipe_of(folder))(batch).metrics
    tags = begun(recipe_of(folder, "objective.contrast_weight=0"))(batch)
    assert tags.loss.item() == pytest.approx(float(both["tag"])) and "contrast" not in tags.metrics
    contrast = begun(recipe_of(folder, "objective.tag_weight=0", "input.tags=null"))(
        {name: value for name, value in batch.items() if name != "tags"}
    )
    assert contrast.loss.item() == pytest.approx(float(both["contrast"])) and "tag" not in contrast.metrics


def test_captions_that_can_not_be_used_are_counted(folder: Path) -> None:
    recipe = recipe_of(folder)
    samples, source = samples_of(recipe)
    place = Place(0, 0, 0, 0, 0)
    for caption, reason in (("红色 square", "caption_cjk"), ("\u200b", "caption_empty"), ("ｶﾒﾗ", "caption_cjk")):
        with pytest.raises(SampleError) as error:
            samples(place, source, members_of(0, caption))
        assert error.value.reason == reason
    kept = samples(place, source, members_of(0, "Ein grünes Quadrat – größer"))
    assert kept["ids"].shape == (1, 12)
    assert samples(place, source, members_of(0, "a red square " * 9))["cut"].tolist() == [17]
    refusing = CaptionedPictures(dataclasses.replace(recipe.input, too_long="refuse"), 5)
    with pytest.raises(SampleError) as error:
        refusing(place, source, members_of(0, "a red square " * 9))
    assert error.value.reason == "text_too_long"


def test_pictures_without_tags_are_replaced_or_counted(folder: Path) -> None:
    recipe = recipe_of(folder)
    (untagged,) = [row for row in range(27) if not len(_row(folder, row))]
    samples, source = samples_of(recipe)
    place = Place(0, untagged, 0, 0, untagged)
    with pytest.raises(SampleError) as error:
        samples(place, source, members_of(0, "a red square"))
    assert error.value.reason == "untagged" and "caption_cjk" in error.value.detail
    keeping = CaptionedPictures(dataclasses.replace(recipe.input, untagged="keep"), 5)
    made = [keeping(one, source, members_of(0, "a red square")) for one in (place, Place(0, 0, 0, 0, 0))]
    batch = keeping.collate([Sample(place, str(number), one) for number, one in enumerate(made)])
    assert (batch["tags"][0] == -1).all() and (batch["tags"][1] >= 0).sum() == len(_row(folder, 0))
    metrics = begun(recipe)(batch).metrics
    alone = begun(recipe)({name: value[1:] for name, value in batch.items()}).metrics
    assert float(metrics["untagged"]) == 0.5
    assert float(metrics["tag"]) == pytest.approx(float(alone["tag"]) / 2), "officially it counts in the mean"


def test_a_substitute_has_its_own_tags(folder: Path, tmp_path: Path) -> None:
    """Its table is looked up where it lies, and not where the sample lies that it stands in for."""
    (tmp_path / "list.txt").write_text("square\nred\n")
    words = [str(folder / "shards"), "--out", str(tmp_path / "tags"), "--attributes"]
    assert tag([*words, "--tag-list", str(tmp_path / "list.txt")]) == 0
    recipe = recipe_of(folder, "input.crop=center", f"input.tags={tmp_path / 'tags'}", "input.tag_count=2")
    index, replaced = load_index(str(folder / "shards")), 0
    table = read_table(str(tmp_path / "tags"), index.shards[0], list_hash(["square", "red"]))
    rows = {key: table.row(row).tolist() for row, key in enumerate(load_members(index.url, index.shards[0]).keys)}
    assert sorted(map(len, rows.values()))[2:12] != [1] * 10, "some have none, some both"
    for batch, _ in zip(training_stream(recipe), range(6), strict=False):
        replaced += len(batch["bad"])
        for key, tags in zip(batch["key"], batch["tags"], strict=True):
            assert tags[tags >= 0].tolist() == rows[key] != [], key
    assert replaced > 1


def _row(folder: Path, row: int) -> np.ndarray:
    index = load_index(str(folder / "shards"))
    return read_table(str(folder / "tags"), index.shards[0], list_hash(read_tags(str(folder / "tags")))).row(row)


def test_tags_of_a_picture_are_those_of_its_caption(folder: Path) -> None:
    tags, index = read_tags(str(folder / "tags")), load_index(str(folder / "shards"))
    numbers = [int(Path(key).name[:3]) for key in load_members(index.url, index.shards[0]).keys]
    assert sorted(numbers)[:24] == list(range(24))
    for row, number in enumerate(numbers):
        if number < 24:
            said = set(drawn(number)[2].split()) - {"a", "and", "on"}
            assert {tags[one] for one in _row(folder, row)} == said


def test_another_order_of_the_tags_is_found(folder: Path, tmp_path: Path) -> None:
    """Of the list beside embeddings, and of the list beside the numbers of samples: both would train on, wrongly."""
    shutil.copytree(folder / "tags", tmp_path / "tags")
    tags = read_tags(str(tmp_path / "tags"))
    (tmp_path / "tags" / "tags.txt").write_text("\n".join([tags[1], tags[0], *tags[2:]]) + "\n")
    recipe = recipe_of(folder, f"input.tags={tmp_path / 'tags'}")
    objective = begun(recipe)
    assert objective.tags is not None
    with pytest.raises(WeightsError, match="input.tags=.*or in another order; embed them again"):
        objective.tags.load()
    samples, source = samples_of(recipe)
    with pytest.raises(DataError, match="numbers of the list .* or in another order"):
        samples(Place(0, 0, 0, 0, 0), source, members_of(0, "a red square"))
    (tmp_path / "tags" / "tags.txt").write_text("\n".join([*tags, tags[0]]) + "\n")
    with pytest.raises(DataError, match=f"tags.txt:{len(tags) + 1}: '{tags[0]}' again"):
        read_tags(str(tmp_path / "tags"))
    missing = recipe_of(folder, f"input.tags={folder}")
    with pytest.raises(DataError, match="tags.txt: can't be read.*launch/tag.py SHARDS --out"):
        CaptionedPictures(missing.input, 0)(Place(0, 0, 0, 0, 0), source, members_of(0, "a"))


def test_another_count_of_tags_and_other_embeddings_are_refused(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, "input.tag_count=10000")
    samples, source = samples_of(recipe)
    with pytest.raises(DataError, match="input.tag_count: found 10000, allowed: 9"):
        samples(Place(0, 0, 0, 0, 0), source, members_of(0, "a red square"))
    shutil.copytree(folder / "tags", tmp_path / "tags")
    where = tmp_path / "tags" / "embeddings.safetensors"
    where.write_bytes(where.read_bytes()[:40])
    objective = begun(recipe_of(folder, f"input.tags={tmp_path / 'tags'}"))
    assert objective.tags is not None
    with pytest.raises(WeightsError, match="no embeddings of launch/tag.py"):
        objective.tags.load()


def test_tagging_goes_on_where_it_stopped(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In parts and again: the same bytes, and nothing is parsed twice."""
    words = [str(folder / "shards"), "--out", str(tmp_path / "tags"), "--attributes"]
    assert tag([*words, "--part", "1/2"]) == 0  # one shard in all: this part has none
    assert "1 shards of other parts are not parsed yet" in capsys.readouterr().err
    assert not (tmp_path / "tags" / "tags.txt").exists()
    assert tag([*words, "--part", "0/2"]) == 0
    assert "26 of 27 samples have one (96.3 %)" in capsys.readouterr().err
    shard = load_index(str(folder / "shards")).shards[0]
    places = [Path(table_path(str(tmp_path / "tags"), shard)), tmp_path / "tags" / "tags.txt"]
    written = [(place.read_bytes(), place.stat().st_mtime_ns) for place in places]
    assert places[1].read_bytes() == (folder / "tags" / "tags.txt").read_bytes()
    assert tag(words) == 0 and "0 shards parsed by rules 2" in capsys.readouterr().err
    assert (places[0].read_bytes(), places[0].stat().st_mtime_ns) == written[0]
    (tmp_path / "list.txt").write_text("bar\nsquare\n")
    (tmp_path / "synonyms.csv").write_text("circle,square\n")
    more = ["--tag-list", str(tmp_path / "list.txt"), "--synonyms", str(tmp_path / "synonyms.csv")]
    assert tag([*words[:-1], *more]) == 0
    assert read_tags(str(tmp_path / "tags")) == ["bar", "square"]
    facts = json.loads((tmp_path / "tags" / "tags.json").read_text())
    assert facts["without"] == {"caption_cjk": 1, "no_tag_of_the_list": 1} and facts["tagged"] == 25


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--clip", "nowhere"], 1, "--clip=nowhere: no such file or folder"),
        (["--clip", "CLIP", "--set", "dimm=3"], 2, "--set dimm=3"),
        (["--clip", "CLIP", "--template", "a photo"], 1, "has no {} in the place of the tag"),
        ([], 2, "nothing to do"),
        (["SHARDS", "--backend", "llm"], 1, "--backend llm: needs --model PATH"),
        (["SHARDS", "--backend", "llm", "--model", "TAGS"], 1, "no language model of transformers in it"),
        (["SHARDS", "--least", "99"], 1, "no tag in the captions"),
    ],
)
def test_what_the_tagging_command_refuses(
    folder: Path, words: list[str], code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"CLIP": "clip.safetensors", "SHARDS": "shards", "TAGS": "tags"}
    given = [str(folder / places[word]) if word in places else word for word in words]
    assert tag([*given, "--out", str(folder / "tags")]) == code
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run.init_weights=null"], "run.init_weights: found null"),
        (["objective.tag_weight=-1"], "objective.tag_weight: found -1"),
        (["objective.tag_weight=0", "objective.contrast_weight=0"], "nothing is learnt"),
        (["input.tags=null"], "input.tags: found null"),
        (["input.context=13"], "input.context: found 13, allowed: at most 12"),
        (["input.tokenizer=clip"], "49408 ids, the text tower has 23"),
        (["input.height=36", "input.width=36"], "allowed: multiples of 8"),
        (["model.surgery_blocks=8"], "model.surgery_blocks: found 8, allowed: 0 to 7"),
        (["model.kernel=2"], "model.kernel: found 2"),
        (["model.kind=transformer", "model.heads=5"], "model.heads: found 5"),
        (["input.name=clip"], "input.name: found clip, allowed: captioned"),
    ],
)
def test_what_can_not_work_is_refused(folder: Path, words: list[str], expected: str) -> None:
    if "input.name=clip" in words:
        text = (folder / "tagalign.yaml").read_text()
        start, end = text.index("input:"), text.index("data:")
        (folder / "other.yaml").write_text(text[:start] + "input: {name: clip, frames: 1}\n" + text[end:])
        found = problems_of(method_of(load_recipe(str(folder / "other.yaml"))))
    else:
        found = problems_of(method_of(recipe_of(folder, *words)))
    assert any(expected in line for line in found), found


def test_a_missing_tower_is_named(folder: Path) -> None:
    recipe = recipe_of(folder, "objective.towers.text_weights=nowhere")
    assert problems_of(method_of(recipe)) == [] == warnings_of(method_of(recipe))
    with pytest.raises(WeightsError, match="objective.towers.text_weights=nowhere: no such file"):
        method_of(recipe).build().frozen_parts()["texts"].load()
    assert trace_step(method_of(recipe), 2, on_cpu=True).clips == 2, "plans need no file"


def test_weights_go_out_and_come_back(folder: Path, tmp_path: Path) -> None:
    """Also in the official layout, scales with it."""
    for kind in ("gated_conv", "transformer"):
        recipe = recipe_of(folder, f"model.kind={kind}")
        objective = begun(recipe)
        with torch.no_grad():
            for value in objective.parameters():
                value.add_(torch.randn_like(value) * 0.1)
        exports = method_of(recipe).exports(tmp_path)
        exports["official"].write(objective, str(tmp_path / "official.pth"))
        again = begun(recipe)
        again.load_pretrained("official.pth", read_raw(str(tmp_path / "official.pth")))
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in objective.state_dict().items())
        exports["safetensors"].write(objective, str(tmp_path / kind))
        loaded = load_trained(tmp_path / kind).objective
        assert _same(objective.model.state_dict(), loaded.model.state_dict())
    raw = load_file(folder / "clip.safetensors")
    raw.pop("visual.head.weight")
    save_file(raw, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match="missing: head.weight"):
        begun(recipe).load_pretrained("part", read_raw(str(tmp_path / "part.safetensors")))


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_two_ranks_are_one_and_a_run_goes_on(folder: Path, tmp_path: Path) -> None:
    """Loss and update of two ranks are those of one to rounding; stopped and resumed they are the same to the bit."""
    toy = Toy(folder / "tagalign.yaml", tmp_path)
    resumed = f"run.dir={tmp_path / 'stopped'}"
    runs: dict[str, dict[str, Any]] = {
        "whole": {"overrides": ["zero.stage=2"]},
        "stopped": {"overrides": ["zero.stage=2", "schedule.max_steps=4"]},
        "resumed": {"overrides": ["zero.stage=2", resumed]},
    }
    assert set(toy.drive(runs, ranks=2).values()) == {0}
    assert toy.drive({"one": {"overrides": ["batch.micro=8"]}}, ranks=1) == {"one": 0}
    assert len(toy.losses("whole")) == 6
    assert toy.losses("whole") == pytest.approx(toy.losses("one"), rel=2e-4)
    assert toy.losses("whole") == toy.losses("stopped")
    first, second = (load_trained(tmp_path / name).objective.state_dict() for name in ("whole", "stopped"))
    assert _same(first, second)


@pytest.mark.faults
def test_a_killed_run_of_two_ranks_goes_on(folder: Path, tmp_path: Path) -> None:
    toy = Toy(folder / "tagalign.yaml", tmp_path)
    words = ("schedule.epochs=4", "zero.stage=2")
    toy.train("whole", *words, ranks=2)
    process = toy.start("killed", *words, ranks=2)
    toy.wait_for("killed", 6, process, timeout_s=400)
    toy.kill(process)
    toy.train("killed", *words, ranks=2)
    assert toy.losses("whole")[-4:] == toy.losses("killed")[-4:]
    first, second = (load_trained(tmp_path / name).objective.state_dict() for name in ("whole", "killed"))
    assert _same(first, second)
