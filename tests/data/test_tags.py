"""Tags from captions: what the rules find, what other parsers' answers become, and which captions are used."""

import json
from pathlib import Path

import pytest

from pretrain.data.tags.caption_parsers import chained, open_parser, read_answer
from pretrain.data.tags.caption_rules import normalised_tag, parse_by_rules, singular
from pretrain.data.tags.captions import usable_caption
from pretrain.errors import DataError, SampleError


@pytest.mark.parametrize(
    ("caption", "objects", "attributes"),
    [
        ("A black cat sitting on two wooden benches.", ["cat", "bench"], [("cat", "black"), ("bench", "wooden")]),
        ("a man's red fire truck", ["man", "truck"], None),
        ("Three shiny cars parked next to the knives", ["car", "knife"], [("car", "shiny")]),
        ("a square table, a square and an orange", ["table", "square", "orange"], [("table", "square")]),
        ("Happy children playing football, quickly", ["child", "football"], [("child", "happy")]),
        ("12 %$ !!", [], []),
        ("a vegetable and a fashionable goldfish", ["vegetable", "goldfish"], [("goldfish", "fashionable")]),
        ("buildings under a colourful evening sky", ["building", "sky"], [("sky", "colourful"), ("sky", "evening")]),
    ],
)
def test_rules(caption: str, objects: list[str], attributes: list[tuple[str, str]] | None) -> None:
    found = parse_by_rules(caption)
    assert found.objects == objects
    assert attributes is None or found.attributes == attributes


def test_plurals_and_what_only_looks_like_one() -> None:
    pairs = {"dresses": "dress", "glass": "glass", "cherries": "cherry", "wolves": "wolf", "bus": "bus", "foxes": "fox",
             "horses": "horse", "gas": "gas", "octopus": "octopus", "beaches": "beach"}  # fmt: skip
    assert {word: singular(word) for word in pairs} == pairs


def test_tags_of_any_parser_have_one_form() -> None:
    assert normalised_tag("The Fire Trucks", {}) == "fire truck"
    assert normalised_tag("Kitties", {"kitty": "cat"}) == "cat"
    assert [normalised_tag(one, {}) for one in ("photos", "the", "x", "", "%")] == [None] * 5


def test_parts_of_speech() -> None:
    tagged = [("A", "DT"), ("black", "JJ"), ("fire", "NN"), ("trucks", "NNS"), ("is", "VBZ"), ("parked", "VBN"),
              ("near", "IN"), ("houses", "NNS")]  # fmt: skip
    found = chained(tagged)
    assert found.objects == ["truck", "house"] and found.attributes == [("truck", "black"), ("truck", "fire")]


@pytest.mark.parametrize(
    ("answer", "objects"),
    [
        ('{"objects": ["cat"], "attributes": [["cat", "black"]]}', ["cat"]),
        ('Sure! {"objects": ["cat", "dog"]} Anything else? }', ["cat", "dog"]),
        ('{"objects": ["cat"], "attributes": [["cat"]]}', None),
        ('{"objects": "cat"}', None),
        ('{"objects": ["cat"', None),
        ("", None),
    ],
)
def test_answers_of_language_models(answer: str, objects: list[str] | None) -> None:
    found = read_answer(answer)
    assert (None if found is None else found.objects) == objects


def test_captions_are_cleaned_or_refused() -> None:
    assert usable_caption(" a\tcat \n on\u200b grass\x07 ") == "a cat on grass"
    assert usable_caption("кошка на траве, ça va 😀") == "кошка на траве, ça va 😀", "other alphabets are no CJK"
    for text, reason in (("", "caption_empty"), ("\u200b \x00", "caption_empty"), ("a 猫", "caption_cjk"),
                         ("고양이", "caption_cjk"), ("ねこ", "caption_cjk"), ("𠮷", "caption_cjk")):  # fmt: skip
        with pytest.raises(SampleError) as error:
            usable_caption(text)
        assert error.value.reason == reason


def test_a_missing_package_or_model_is_named(tmp_path: Path) -> None:
    for backend in ("spacy", "nltk"):
        with pytest.raises(DataError, match=f"--backend {backend}: needs"):
            open_parser(backend, str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the backend rules has none"):
        open_parser("rules", "x")


def test_a_language_model_in_a_folder_answers_greedily(tmp_path: Path) -> None:
    """One that has learnt nothing: its answers are of no use, which is told; and they are the same twice."""
    import torch

    from pretrain.runtime.vision_ops import ensure_torchvision

    ensure_torchvision()
    import transformers

    from tests.captioned_pictures import WORDS, write_tokenizer

    write_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    torch.manual_seed(0)
    sizes = {"n_positions": 600, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=len(WORDS), **sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    parser = open_parser("llm", str(tmp_path))
    assert parser(["a red square", "a circle"]) == [None, None]
    assert parser.version == open_parser("llm", str(tmp_path)).version and "gpt2" in parser.version
