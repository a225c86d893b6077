"""CycleACR's head on two pathways, and on a VideoMAE ViT: every tensor of both phases, losses, gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.cycleacr.grouped_loss import grouped_loss
from finetune.cycleacr.head_weights import official_names
from finetune.cycleacr.memory_bank import MemoryBank, MemoryOptions, SeenKeyframes, video_number
from finetune.cycleacr.objective import MOMENTS, CycleACRObjective
from finetune.detection.roi_head import extend_boxes_inclusive
from finetune.recipe import load_tune_recipe
from pretrain.models.cycleacr import CycleACRHead, HeadShape
from pretrain.models.initial_weights import read_weights
from pretrain.models.interaction import PersonPlaces
from pretrain.models.weights import LoadReport, load_state, read_state
from pretrain.objectives.base import method_of, problems_of
from pretrain.runtime.process_group import Ranks

KINDS = ("cycleacr", "cycleacr_videomae")
ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def near(case: Any) -> dict[str, float]:
    return {key: case.meta["tolerance"][key] for key in ("rtol", "atol")}


def joined(case: Any, name: str) -> Tensor:
    tensors = case.tensors()
    return torch.cat([tensors[f"{name}{clip}"] for clip in range(len(case.meta["config"]["nb"]))])


def flat(value: Tensor) -> Tensor:
    """Without the axes of one element that the official 1x1 convolutions need."""
    return value.flatten(2) if value.dim() == 5 and value.shape[2] > 1 else value.reshape(value.shape[0], -1)


def persons_of(case: Any) -> PersonPlaces:
    counts = torch.tensor(case.meta["config"]["nb"])
    return PersonPlaces.of(counts, int(counts.sum()))


def memory_options(config: dict[str, Any], penalty: bool = True) -> MemoryOptions:
    rate = config.get("rate", config.get("memory_rate", 1))
    past, future = config["length"]
    return MemoryOptions(past, future, rate, config["mps"], dtype="float32", penalty=config.get("penalty", penalty))


def remembered(case: Any, features: list[Tensor], entries: list[tuple[str, int, float]]) -> SeenKeyframes:
    rows = [one.flatten(1) for one in features]
    videos, seconds, tags = zip(*entries, strict=True)
    return SeenKeyframes(
        torch.tensor([video_number(name) for name in videos]), torch.tensor(seconds),
        torch.tensor([len(one) for one in rows]), torch.tensor(tags, dtype=torch.float64), torch.cat(rows),
        torch.ones(sum(map(len, rows))),
    )  # fmt: skip


def bank_of(case: Any) -> MemoryBank:
    """The bank with the entries of other keyframes."""
    config, tensors = case.meta["config"], case.tensors()
    bank = MemoryBank(config["inner"], memory_options(config), seed=0)
    extra = case.meta["memory_bank_extra_entries"]
    entries = [(one["movie"], one["second"], one["loss_tag_in_training"]) for one in extra]
    bank.put(remembered(case, [tensors[f"eval.bank_extra{one['index']}"] for one in extra], entries), ALONE)
    return bank


def moments_of(case: Any) -> tuple[list[int], list[int], list[int]]:
    clips = case.meta["clips"]
    return [video_number(name) for name in clips["movie_ids"]], clips["timestamps"], case.meta["config"]["nb"]


def with_current(bank: MemoryBank, case: Any, features: Tensor) -> None:
    """Add the persons of the case's own keyframes: clips of one video look at one another."""
    clips = case.meta["clips"]
    entries = [(movie, second, 1.0) for movie, second in zip(clips["movie_ids"], clips["timestamps"], strict=True)]
    bank.put(remembered(case, list(features.split(case.meta["config"]["nb"])), entries), ALONE)


def window_of(bank: MemoryBank, case: Any, features: Tensor, loss: float | None) -> Tensor:
    """What the objective makes of the memory: windows with the keyframes' own persons in the middle."""
    videos, seconds, _ = moments_of(case)
    options, persons = bank.options, persons_of(case)
    window = bank.windows(torch.tensor(videos), torch.tensor(seconds), ALONE, loss)
    first, most = options.past * options.max_per_second, options.max_per_second
    window[:, first : first + most] = persons.table(features.detach(), most, torch.ones(len(features)))
    return window


def head_of(case: Any) -> CycleACRHead:
    config = case.meta["config"]
    shape = HeadShape(
        inputs=config["DIM_IN"], times=config["tf"], scale=config["pooler_scale"], classes=config["num_classes"],
        dim=config["inner"], outputs=config["DIM_OUT"], hidden=config["mlp"], depth=config["depth"],
        instance_depth=config["idepth"], max_persons=config["maxp"], max_per_second=config["mps"],
        seconds=sum(config["length"]) + 1, position_codes=config["tp"], fusion=config["fusion"], dropout=0.0,
    )  # fmt: skip
    head = CycleACRHead(shape)
    load_state(head, read_state(case.weights), LoadReport(case.weights, "official"))
    return head


def seen_outputs(module: nn.Module) -> dict[str, Tensor]:
    """Outputs of every part of a module, by name, as they come."""
    found: dict[str, Tensor] = {}
    for name, part in module.named_modules():
        part.register_forward_hook(lambda _, __, output, name=name: found.__setitem__(name, output))
    return found


def check_blocks(outputs: dict[str, Tensor], case: Any, prefix: str) -> None:
    """Compare every block's output that a case names."""
    count = 0
    for name, wanted in case.tensors().items():
        if name.startswith(prefix) and "_blocks." in name:
            (own,) = [key for key in outputs if key.endswith("." + name.removeprefix(prefix))]
            found = outputs[own].transpose(1, 2) if outputs[own].dim() == 3 else outputs[own]
            torch.testing.assert_close(found.flatten(1), wanted.flatten(1), **near(case))
            count += 1
    assert count


def maps_of(case: Any) -> list[Tensor]:
    return [case.tensors()[f"{name}_features"] for name in ("slow", "fast") if f"{name}_features" in case.tensors()]


def head_in_two_phases(case: Any, _: pytest.MonkeyPatch) -> None:
    config, tensors, persons = case.meta["config"], case.tensors(), persons_of(case)
    head, scores = head_of(case).eval(), joined(case, "eval.det_scores")
    outputs = seen_outputs(head)
    width, height = config["image_size_wh"]
    sizes = torch.tensor([[height, width]]).expand(len(scores), 2)
    boxes = extend_boxes_inclusive(joined(case, "eval.boxes"), tuple(config["test_extend_scale"]), sizes)
    torch.testing.assert_close(boxes, joined(case, "eval.part0.proposals"), **near(case))
    with torch.no_grad():
        actors = head.actors(maps_of(case), boxes, persons)
        check_blocks(outputs, case, "eval.part0.")
        module = "feature_extractor.cycleacr_module."
        torch.testing.assert_close(actors.pooled, flat(tensors["eval.part0.roi_features"]), **near(case))
        for name in ("actor", "context", "local"):
            found, wanted = outputs[f"{module}{name}_dim_reduce"], tensors[f"eval.part0.{name}_red"].flatten(1)
            found = found[persons.clips].transpose(1, 2) if name == "context" else found
            torch.testing.assert_close(found.flatten(1), wanted, **near(case))
        torch.testing.assert_close(
            outputs[f"{module}cycle_modeling"], flat(tensors["eval.part0.cycle_out"]), **near(case)
        )
        torch.testing.assert_close(actors.features, flat(joined(case, "eval.part0.bank_entry")), **near(case))
        bank = bank_of(case)
        with_current(bank, case, actors.features)
        window = window_of(bank, case, actors.features, None)
        torch.testing.assert_close(window[persons.clips], tensors["eval.memory_keys"].flatten(2), **near(case))
        others: list[Tensor] = []
        interaction = head.feature_extractor.cycleacr_module.instance_interaction
        for block in interaction.p_blocks:
            block.register_forward_pre_hook(lambda _, given: others.append(given[1][given[2]]))
        logits = head.classify(actors, persons, window, torch.ones(len(scores)))
    check_blocks(outputs, case, "eval.part1.")
    torch.testing.assert_close(others[0], tensors["eval.person_keys"].flatten(2), **near(case))
    poses, others = logits.split((14, logits.shape[1] - 14), 1)
    found = torch.cat((poses.softmax(1), others.sigmoid()), 1) * scores
    torch.testing.assert_close(found, joined(case, "eval.scores"), **near(case))


def head_in_training(case: Any) -> None:
    tensors, persons, head = case.tensors(), persons_of(case), head_of(case).train()
    actors = head.actors(maps_of(case), joined(case, "train.proposals"), persons)
    torch.testing.assert_close(actors.features, flat(joined(case, "train.bank_entry")), **near(case))
    loss = case.meta["train"]["cur_loss"] if case.meta["config"]["penalty"] else None
    window = window_of(bank_of(case), case, actors.features, loss)
    torch.testing.assert_close(window[persons.clips], tensors["train.memory_keys"].flatten(2), **near(case))
    logits = head.classify(actors, persons, window, torch.ones(len(actors.features)))
    found = grouped_loss(logits, joined(case, "train.labels").float(), torch.tensor(float(len(logits))))
    names = {"pose": "pose_action", "object": "object_interaction", "person": "person_interaction"}
    for own, official in names.items():
        torch.testing.assert_close(found.losses[own], tensors[f"train.loss_{official}"], **near(case))
        torch.testing.assert_close(found.accuracies[own], tensors[f"train.metric.accuracy_{official}"], **near(case))
    torch.testing.assert_close(found.total, tensors["train.total"], **near(case))
    found.total.backward()
    check_gradients(head, case, lambda name: name)


def check_gradients(module: nn.Module, case: Any, own_name: Any) -> None:
    parameters, wanted = dict(module.named_parameters()), case.tensors()
    names = [name for name in wanted if name.startswith("train.grad.")]
    assert names
    for name in names:
        found, expected = parameters[own_name(name.removeprefix("train.grad."))].grad, wanted[name].flatten()
        assert found is not None
        difference = float((found.flatten() - expected).norm() / expected.norm())
        assert difference < case.meta["tolerance"]["grad_rtol"], (name, difference)


class Normalised(CycleACRObjective):
    """Given clips that are normalised already."""

    def clips(self, batch: dict[str, Any]) -> Tensor:
        clips: Tensor = batch["video"]
        return clips


def objective_of(case: Any) -> Normalised:
    sizes, options = case.meta["config"], memory_options(case.meta["config"])
    model = {
        "size": "custom", "dim": sizes["dim"], "depth": sizes["vdepth"], "heads": sizes["heads"], "drop_path": 0,
        "mlp_ratio": sizes["mlp_ratio"], "patch_size": sizes["patch"], "tubelet": sizes["tubelet"],
        "classes": sizes["num_classes"], "pretrain_frames": sizes["frames"], "pretrain_height": sizes["img"],
        "pretrain_width": sizes["img"],
    }  # fmt: skip
    head = {
        "extension": sizes["test_extend_scale"], "dim": sizes["inner"], "outputs": sizes["DIM_OUT"],
        "hidden": sizes["mlp"], "depth": sizes["depth"], "instance_depth": sizes["idepth"],
        "max_persons": sizes["maxp"], "fusion": sizes["fusion"], "dropout": 0,
    }  # fmt: skip
    memory = {name: getattr(options, name) for name in ("past", "future", "rate", "max_per_second", "dtype")}
    words = [f"model.{key}={value}" for key, value in model.items()]
    words += [f"objective.{key}={value}" for key, value in head.items()]
    words += [f"objective.memory.{key}={value}" for key, value in memory.items()]
    words += [f"input.frames={sizes['frames']}", f"input.crop_size={sizes['img']}", f"input.pad={sizes['patch']}",
              f"input.short_side={max(sizes['hw'])}"]  # fmt: skip
    recipe = load_tune_recipe("vit_l_cycleacr_ava", words)
    method = method_of(recipe)
    assert not problems_of(method)
    built = Normalised(method.build().model, recipe, method.architecture)  # type: ignore[attr-defined]
    built.load_pretrained(case.weights, read_weights(case.weights))
    built.bank = bank_of(case)
    return built


def batch_of(case: Any, boxes: str) -> dict[str, Any]:
    tensors, config = case.tensors(), case.meta["config"]
    video = (tensors["video"].float() / 32).permute(0, 2, 3, 4, 1)
    sizes = torch.tensor([config["hw"]] * len(video))
    counts = torch.tensor(config["nb"])
    return {"video": video, "boxes": joined(case, boxes), "counts": counts, "sizes": sizes, "originals": sizes,
            "videos": case.meta["clips"]["movie_ids"], "times": torch.tensor(case.meta["clips"]["timestamps"]).double(),
            "box_scores": torch.ones(int(counts.sum())), MOMENTS: moments_of(case)}  # fmt: skip


def vit_in_two_phases(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, tensors = objective_of(case).eval(), case.tensors()
    batch = batch_of(case, "eval.boxes") | {"box_scores": joined(case, "eval.det_scores").flatten()}
    with torch.no_grad():
        (backbone,) = objective._maps(batch)
    torch.testing.assert_close(backbone, tensors["eval.part0.backbone"], **near(case))
    outputs = seen_outputs(objective.model.head)
    # The memory of a test is its own: here it begins with the entries of the case.
    monkeypatch.setattr(objective, "_new_bank", lambda: bank_of(case))
    answers = objective.detect_all([batch])
    module = "feature_extractor.cycleacr_module."
    torch.testing.assert_close(outputs[f"{module}cycle_modeling"], flat(tensors["eval.part0.cycle_out"]), **near(case))
    torch.testing.assert_close(
        outputs[f"{module}roi_dim_reduce"], flat(joined(case, "eval.part0.bank_entry")), **near(case)
    )
    instance = outputs[f"{module}instance_interaction"]
    torch.testing.assert_close(instance, flat(tensors["eval.part1.instance_out"]), **near(case))
    torch.testing.assert_close(outputs["feature_extractor.fc2"].relu(), tensors["eval.part1.head_hidden"], **near(case))
    torch.testing.assert_close(outputs["predictor"], tensors["eval.part1.logits"], **near(case))
    scores = torch.cat([torch.from_numpy(one.scores) for one in answers])
    torch.testing.assert_close(scores, joined(case, "eval.scores"), **near(case))
    assert [len(one.boxes) for one in answers] == case.meta["config"]["nb"]


def vit_in_training(case: Any) -> None:
    objective, tensors = objective_of(case).train(), case.tensors()
    objective.last_loss.fill_(case.meta["train"]["cur_loss"])
    outputs = seen_outputs(objective.model.head)
    batch = batch_of(case, "train.proposals") | {"labels": joined(case, "train.labels").float()}
    loss = objective(batch).loss
    torch.testing.assert_close(outputs["predictor"], tensors["train.logits"], **near(case))
    torch.testing.assert_close(loss, tensors["train.loss"], **near(case))
    loss.backward()
    check_gradients(objective.model, case, lambda name: next(iter(official_names({name: torch.zeros(1)}))))
    before = len(objective.bank)
    objective.after_step()
    assert len(objective.bank) == before + len(batch["boxes"])
    assert float(objective.last_loss) == pytest.approx(float(loss))


def test_two_phases(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    {"cycleacr": head_in_two_phases, "cycleacr_videomae": vit_in_two_phases}[case.kind](case, monkeypatch)


def test_training(case: Any) -> None:
    {"cycleacr": head_in_training, "cycleacr_videomae": vit_in_training}[case.kind](case)
