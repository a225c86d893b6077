"""Zero-shot classes: equal to open_clip's on its own sentences; lists from files; what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.errors import DataError, RecipeError
from pretrain.models.clip import Config, TextTower
from pretrain.models.clip_weights import our_names
from pretrain.objectives.zero_shot import (
    Sentences,
    class_embeddings,
    class_names,
    sentences,
    similarities,
    tokenizer_for,
)
from pretrain.runtime.vision_ops import ensure_torchvision

SIZES: dict[str, Any] = {
    "size": "custom", "image_size": 16, "patch_size": 16, "dim": 64, "depth": 1, "heads": 1, "embedding": 12,
    "text_dim": 32, "text_depth": 1, "text_heads": 2, "activation": "quick_gelu",
}  # fmt: skip


def test_classes_are_those_of_open_clip() -> None:
    ensure_torchvision()
    import open_clip

    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 16, "head_width": 64}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    reference = open_clip.CLIP(12, vision, text, quick_gelu=True).eval()
    tower = TextTower(Config(**SIZES)).eval()
    state = our_names(reference.state_dict())
    tower.load_state_dict(
        {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
    )
    names = class_names("imagenet")[:3]
    assert len(class_names("imagenet")) == 1000 and names[0] == "tench"
    for which, theirs, count in (
        ("openai", open_clip.OPENAI_IMAGENET_TEMPLATES, 80),
        ("simple", open_clip.SIMPLE_IMAGENET_TEMPLATES, 7),
    ):
        texts = sentences(which, names)
        assert [len(one) for one in texts] == [count] * 3
        with torch.no_grad():
            wanted = open_clip.build_zero_shot_classifier(
                reference, open_clip.SimpleTokenizer(), names, theirs, num_classes_per_batch=2
            )
        found = class_embeddings(tower, tokenizer_for(Sentences(), Config(**SIZES)), texts, torch.device("cpu"))
        torch.testing.assert_close(found, wanted.t(), rtol=1e-5, atol=1e-5)
    embeddings = torch.randn(4, 12)
    wanted = embeddings / embeddings.norm(dim=-1, keepdim=True) @ found.t()
    torch.testing.assert_close(similarities(embeddings, found), wanted)


def test_lists_of_ones_own(tmp_path: Path) -> None:
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("red fox\n\n{odd} owl\n")
    templates.write_text("a photo of a {}.\na drawing of {}, and {} again\n")
    assert class_names(str(names)) == ["red fox", "{odd} owl"]
    assert sentences(str(templates), class_names(str(names))) == [
        ["a photo of a red fox.", "a drawing of red fox, and red fox again"],
        ["a photo of a {odd} owl.", "a drawing of {odd} owl, and {odd} owl again"],
    ]


def test_lists_that_can_not_work_are_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.txt").write_text("fox\nowl\nfox\n")
    with pytest.raises(DataError, match="fox: more than once"):
        class_names(str(tmp_path / "twice.txt"))
    with pytest.raises(DataError, match="'fox' has no {}"):
        sentences(str(tmp_path / "twice.txt"), ["a"])
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="an empty file"):
        class_names(str(tmp_path / "empty.txt"))
    with pytest.raises(DataError, match="nowhere.txt"):
        sentences(str(tmp_path / "nowhere.txt"), ["a"])
    with pytest.raises(RecipeError, match="49408 ids, the text tower has 100"):
        tokenizer_for(Sentences(), Config(**{**SIZES, "vocabulary": 100}))
