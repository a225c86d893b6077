"""Tiny narrated films and captioned clips, a tokenizer for their words, and a recipe over them."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from tests.toy_shards import encoded, index, write_shard

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 230), "white": (230, 230, 230)}
#: Frames a second, and length of a film of four segments of a second and three pauses of a quarter.
RATE, SECONDS = 12, 5.0
#: Of a toy model's two towers; the text tower is large enough to have a frozen part.
MODEL = """{name: tvtsv2, size: custom, image_size: 32, patch_size: 8, dim: 32, depth: 2, heads: 2, embedding: 24,
        text_dim: 16, text_depth: 4, text_heads: 2, activation: quick_gelu, context: 8, vocabulary: 16,
        sort_heads: 2, frames: 6}"""
RECIPE = f"""\
model: {MODEL}
objective: {{name: tvtsv2}}
input:
  name: narrated
  frames: 8
  height: 32
  width: 32
  narrated: [films]
  seconds: [1]
  gap: 0.25
  tokenizer: FOLDER/tokenizer.json
  context: 8
data:
  sources:
    films: {{shards: FOLDER/films}}
    clips: {{shards: FOLDER/clips}}
  compose: alternate
  lanes: 4
  shuffle_window: 4
  workers: 0
batch: {{samples: 8, micro: 4}}
optim: {{base_lr: 2e-3, scaled: none, eps: 1e-6, betas: [0.9, 0.999]}}
schedule: {{epochs: 2, shape: constant, warmup_epochs: 0}}
compute: {{dtype: fp32}}
zero: {{stage: 1}}
checkpoint: {{every_steps: 4, keep_last: 2}}
log: {{every_steps: 1, pictures_every_steps: 0, wandb: disabled, peak_tflops: 0.1}}
"""


def picture(colour: str, rng: np.random.Generator, side: tuple[int, int] = (44, 60)) -> np.ndarray:
    """Dark noise with a square of a colour."""
    pixels = rng.integers(0, 60, (*side, 3), dtype=np.uint8)
    pixels[8:36, 12:44] = COLOURS[colour]
    return pixels


def film(order: tuple[str, ...], number: int) -> bytes:
    """A film of four colours, one after the other."""
    rng = np.random.default_rng(number)
    frames = round(SECONDS * RATE)
    return encoded([picture(order[min(int(f / frames * 4), 3)], rng) for f in range(frames)], RATE)


def narration(order: tuple[str, ...]) -> dict[str, Any]:
    """YT-Temporal's annotation: a word of each segment in its middle, misheard, and the words as they should be."""
    said = [{"word": f"{colour[:-1]}e", "time": 0.6 + 1.25 * place} for place, colour in enumerate(order)]
    return {"subtitles": said, "denoised": [{"cleanasr": " ".join(order)}], "info": {"duration": SECONDS}}


def make_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    words = ["[PAD]", "[UNK]", "<start>", "a", "person", "square", *COLOURS, "dog", "cat", "0", "1", "2", "<end>"]
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    marks = [(word, words.index(word)) for word in ("<start>", "<end>")]
    tokenizer.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=marks)
    tokenizer.save(str(path))


def make_films(folder: Path) -> Path:
    """Shards of 24 films and 16 clips, tokenizer and recipe in a folder; returns the recipe."""
    for name in ("films", "clips"):
        (folder / name).mkdir(parents=True)
    orders = list(itertools.permutations(COLOURS))
    write_shard(folder / "films" / "films-000000.tar", (
        (f"film{number:02d}", {"narration": narration(order)}, film(order, number))
        for number, order in enumerate(orders)
    ))  # fmt: skip
    write_shard(folder / "clips" / "clips-000000.tar", (
        (f"clip{number:02d}", {"caption": f"a {colour} square", "label": colour},
         encoded([picture(colour, np.random.default_rng(100 + number)) for _ in range(16)]))
        for number, colour in enumerate(list(COLOURS) * 4)
    ))  # fmt: skip
    index(folder / "films", folder / "clips")
    make_tokenizer(folder / "tokenizer.json")
    recipe = folder / "narrated.yaml"
    recipe.write_text(RECIPE.replace("FOLDER", str(folder)))
    return recipe
