"""Pictures of coloured shapes with captions and masks, a tiny CLIP with random weights, and tags of the captions."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pretrain.models import clip

SIDE = 48
SHAPES = ("square", "circle", "bar")
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230)}
#: Captions of the last pictures: what data of strangers have.
ODD = ("", "红色 square", "hello there", "a red square " + "and a circle " * 20)
WORDS = (
    "[PAD]", "[UNK]", "a", "the", "and", "on", "grey", "ground", "photo", "of", ".", *SHAPES, *COLOURS,
    "squares", "circles", "bars", "hello", "[BOS]", "[EOS]",
)  # fmt: skip
CONFIG = clip.Config(
    size="custom", image_size=32, patch_size=8, dim=32, depth=7, heads=2, embedding=24, text_dim=32, text_depth=1,
    text_heads=2, activation="quick_gelu", context=12, vocabulary=len(WORDS),
)  # fmt: skip
RECIPE = """\
model: {name: patch_projector, heads: 4, clip: {SIZES}}
objective:
  name: tagalign
  towers: {weights: FOLDER/clip.safetensors, dtype: fp32}
input: {name: captioned, height: 32, width: 32, tokenizer: FOLDER/tokenizer.json, context: 12, tags: FOLDER/tags,
        tag_count: COUNT}
data:
  sources: {toy: {shards: FOLDER/shards}}
  lanes: 4
  shuffle_window: 4
  workers: 0
  bad_rate: 0.9
batch: {samples: 8, micro: 4}
optim: {base_lr: 1e-2, base_batch: 8, clip_grad: 5.0, betas: [0.9, 0.999]}
schedule: {epochs: 2, warmup_epochs: 0, shape: constant}
compute: {dtype: fp32}
zero: {stage: 0}
checkpoint: {every_steps: 4, keep_last: 2}
log: {every_steps: 1, pictures_every_steps: 0, wandb: disabled, peak_tflops: 0.1}
run: {init_weights: "${objective.towers.weights}"}
"""


def drawn(number: int) -> tuple[np.ndarray, np.ndarray, str]:
    """A picture [48, 48, 3], its mask (0 ground, then shapes in order) and its caption."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(90, 140, (SIDE, SIDE, 3)).astype(np.uint8)
    mask, said = np.zeros((SIDE, SIDE), np.uint8), []
    y, x = np.mgrid[:SIDE, :SIDE]
    for place in rng.permutation(3)[:2]:
        shape, colour = int(rng.integers(3)), str(rng.choice(list(COLOURS)))
        top, left = (int(one) for one in (rng.integers(2, 24), 2 + 15 * place))
        inside = {
            "square": (abs(y - top - 8) < 7) & (abs(x - left - 7) < 7),
            "circle": (y - top - 8) ** 2 + (x - left - 7) ** 2 < 50,
            "bar": (abs(y - top - 8) < 12) & (abs(x - left - 7) < 2),
        }[SHAPES[shape]]
        pixels[inside], mask[inside] = COLOURS[colour], shape + 1
        said.append(f"a {colour} {SHAPES[shape]}")
    return pixels, mask, " and ".join(said) + " on grey ground"


def write_tokenizer(path: Path) -> None:
    """A tokenizer.json of words, between start and end; the end has the highest id, as CLIP's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [(name, WORDS.index(name)) for name in ("[BOS]", "[EOS]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=marks)
    tokenizer.save(str(path))


def make_world(folder: Path, pictures: int = 24) -> Path:
    """Write pictures, masks, captions, shards of them, a CLIP, its tokenizer, tags, and a recipe over all."""
    from pretrain.commands.pack import main as pack
    from pretrain.commands.tag import main as tag

    for number in range(pictures + len(ODD)):
        pixels, mask, caption = drawn(number)
        path = folder / "pictures" / f"{number:03d}.png"
        for place, array in ((path, pixels), (folder / "masks" / path.name, mask)):
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(place)
        caption = caption if number < pictures else ODD[number - pictures]
        path.with_suffix(".txt").write_text(caption or " ", encoding="utf-8")
    words = ["--kind", "image", "--no-labels", "--with", f"txt,mask.png={folder / 'masks'}", "--workers", "0"]
    assert pack([str(folder / "pictures"), str(folder / "shards"), *words]) == 0
    torch.manual_seed(0)
    model = clip.CLIP(CONFIG)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    save_file(model.state_dict(), folder / "clip.safetensors")
    write_tokenizer(folder / "tokenizer.json")
    sizes = [f"{key}={value}" for key, value in given().items()]
    words = ["--clip", str(folder / "clip.safetensors"), "--tokenizer", str(folder / "tokenizer.json"), "--set", *sizes]
    assert tag([str(folder / "shards"), "--out", str(folder / "tags"), "--attributes", *words]) == 0
    count = len((folder / "tags" / "tags.txt").read_text().splitlines())
    text = RECIPE.replace("SIZES", ", ".join(f"{key}: {value}" for key, value in given().items()))
    text = text.replace("FOLDER", str(folder)).replace("COUNT", str(count))
    (folder / "tagalign.yaml").write_text(text)
    return folder


def given() -> dict[str, object]:
    """What the CLIP departs in from a published size."""
    every = dataclasses.asdict(CONFIG)
    return {key: value for key, value in every.items() if value is not None and key not in ("name",)}


def world(factory: pytest.TempPathFactory) -> Path:
    """The files of `make_world`, made once for all tests of a process."""
    folder = factory.getbasetemp() / "captioned"
    return folder if (folder / "tagalign.yaml").exists() else make_world(folder)
