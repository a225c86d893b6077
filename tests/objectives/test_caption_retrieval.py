"""Pictures found by captions and captions by pictures: known embeddings, and the command on a bootstrapped CLIP."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.nn import functional as F

from pretrain.commands.zero_shot import main
from pretrain.errors import DataError, RecipeError
from pretrain.models.clip import CLIP as CLIPModel
from pretrain.objectives.base import method_of
from pretrain.objectives.caption_retrieval import both_ways, caption_retrieval
from pretrain.recipe.load import load_recipe
from pretrain.samples.text import Tokenizer
from tests.objectives.test_bootstrap import CLIP, RECIPE
from tests.toy_shards import index

CPU = torch.device("cpu")
#: Some pictures have two captions, one has none, one is broken.
CAPTIONS: list[Any] = [["a red square", "a cat"], "two dogs", ["the sea"], None, ["a cat", "a sky", "snow"], "broken"]


def test_all_captions_of_a_picture_belong_to_it() -> None:
    """Two pictures, three captions: the second picture's first caption is nearest to the first picture."""
    pictures = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    texts = torch.tensor([[0.9, 0.1], [1.0, 0.0], [0.1, 0.9]])
    found = both_ways(pictures, texts, torch.tensor([0, 1, 1]))
    assert found["text_to_image"].recall[1] == pytest.approx(200 / 3) and found["text_to_image"].queries == 3
    assert found["image_to_text"].recall == {1: 50, 5: 100, 10: 100} and found["image_to_text"].mean_rank == 1.5


def test_equal_captions_share_their_place() -> None:
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = both_ways(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), texts, torch.tensor([0, 1]))
    assert found["image_to_text"].mean_rank == 1.5, "both captions are equally near to either picture"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("captioned")
    with webdataset.TarWriter(str(folder / "pictures-000000.tar")) as shard:
        for number, captions in enumerate(CAPTIONS):
            stored = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((61, 50)).save(stored, "png")
            content = b"no picture" if captions == "broken" else stored.getvalue()
            facts = {} if captions is None else {"caption": captions}
            shard.write({"__key__": f"{number:03d}", "png": content, "json": facts})
    index(folder)
    return str(folder)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, CLIPModel]:
    """The export of a student that has inherited from a CLIP with random weights, its recipe, and that CLIP."""
    folder = tmp_path_factory.mktemp("student")
    (folder / "bootstrap.yaml").write_text(RECIPE.replace("FOLDER", str(folder)).replace("SHARDS", "nowhere"))
    words = [*CLIP, f"objective.teacher.weights={folder / 'clip.pth'}", "model.norm_eps=1e-5", "data.bad_minimum=10"]
    recipe = load_recipe(str(folder / "bootstrap.yaml"), words)
    torch.manual_seed(4)
    both = CLIPModel(recipe.objective.teacher.clip).eval()
    torch.save(both.state_dict(), folder / "clip.pth")
    method = method_of(recipe)
    objective = method.build()
    objective.load_pretrained("clip.pth", both.state_dict())
    method.exports(folder)["safetensors"].write(objective, str(folder / "out"))
    return folder / "out", recipe, both


def test_the_command(
    student: tuple[Path, Any, CLIPModel], shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher's numbers are those of a loop over its own embeddings; the student has some of its own."""
    run, recipe, both = student
    method = method_of(recipe)
    objective: Any = method.build().eval()
    objective.load_pretrained("clip.pth", both.state_dict())
    found = caption_retrieval(objective, recipe, method.samples(), shards, "", CPU)
    assert (found.pictures, found.captions, len(found.unreadable)) == (4, 7, 2)
    used = [0, 1, 2, 4]
    owners = [0, 0, 1, 2, 3, 3, 3]
    flat = [text for number in used for text in ([CAPTIONS[number]] if number == 1 else CAPTIONS[number])]
    with torch.no_grad():
        ids = torch.from_numpy(Tokenizer("clip", 77, too_long="cut").encode(flat).ids)
        texts = F.normalize(both.text(ids), dim=-1)
        rows = [method.samples().without_chance(*sample(shards, number)) for number in used]
        batch = {name: torch.from_numpy(np.concatenate([row[name] for row in rows])) for name in rows[0]}
        pictures = F.normalize(objective.answers(batch).teacher, dim=-1)
    similarity = texts @ pictures.T
    ranks = [int((row > row[owner] + 1e-7).sum()) for row, owner in zip(similarity, owners, strict=True)]
    one = found.scores["teacher", "text_to_image"]
    assert one.mean_rank == pytest.approx(1 + np.mean(ranks)) and one.recall[5] == 100
    assert found.scores["teacher", "image_to_text"].queries == 4 and len(found.scores) == 4
    assert main([str(run), shards, "--captions", "--micro", "3"]) == 0
    shown = capsys.readouterr().out
    assert "4 pictures, 7 captions" in shown and "2 pictures can't be used" in shown
    assert f"teacher, text to image:  R@1 {one.recall[1]:6.2f} %" in shown and "student, image to text" in shown


def sample(shards: str, number: int) -> tuple[Any, Any]:
    """A picture as held-out samples are read."""
    from pretrain.data.fetch import SampleReader
    from pretrain.data.held_out import HeldOutSet
    from pretrain.data.index import load_index
    from pretrain.data.members import parse_sample
    from pretrain.recipe.schema import Source

    found = HeldOutSet("captions", load_index(shards), Source(shards=shards))
    return found.source, parse_sample(SampleReader([found.index], None, 10.0).read(0, 0, number))


def test_what_can_not_be_compared_is_refused(student: tuple[Path, Any, CLIPModel], shards: str, tmp_path: Path) -> None:
    run, recipe, _ = student
    method = method_of(recipe)
    objective = method.build().eval()
    with pytest.raises(DataError, match=r"no picture with a caption \(.*nothing"):
        caption_retrieval(objective, recipe, method.samples(), shards, "nothing", CPU)
    timm = load_recipe(str(run.parent / "bootstrap.yaml"))
    with pytest.raises(RecipeError, match="teacher is of kind timm, which has read nothing"):
        caption_retrieval(objective, timm, method.samples(), shards, "", CPU)
