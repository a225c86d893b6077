"""Texts to ids: equal to the libraries' own, nothing cut in silence, and the same in a spawned worker."""

import json
import multiprocessing
import pickle
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from pretrain.errors import DataError, SampleError
from pretrain.runtime.vision_ops import ensure_torchvision
from pretrain.samples.text import Tokenizer

TEXTS = [
    "a photo of a cat",
    "",
    " \n\t ",
    "Ein Käfer läuft über den Weg – „schön“!",
    "子猫がソファで眠っている。",
    "قطة تجلس على السجادة",
    "Кошка сидит на коврике",
    "ผู้ชายกำลังขี่ม้า",
    "🐈‍⬛🏃🏽‍♀️ go!! 100% &amp; more",
    "MIXED Case, it's 1234567890 …",
    "schÃ¶n (broken twice) &lt;b&gt;",
    "zero\x00byte and \ud83d half an emoji",
    "a a a a a a a a",
    "word " * 200,
]


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer("clip", 77, too_long="cut")


def train(folder: Path, marks: tuple[str, ...] = ("<s>", "</s>"), extra: tuple[str, ...] = ("<pad>",)) -> Path:
    """A small byte-level tokenizer.json whose post-processor adds `marks` (start, end), or only an end."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=400, special_tokens=[*extra, *marks], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["a cat sits on the mat", "a dog runs over the mat"] * 5, trainer)
    if marks:
        around = f"{marks[0]} $A {marks[1]}" if len(marks) == 2 else f"$A {marks[0]}"
        ids = [(mark, int(tokenizer.token_to_id(mark))) for mark in marks]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_same_ids_as_open_clip(clip: Tokenizer) -> None:
    ensure_torchvision()
    import open_clip

    encoded = clip.encode(TEXTS)
    np.testing.assert_array_equal(encoded.ids, open_clip.tokenize(TEXTS).numpy())
    assert encoded.ids.dtype == encoded.lengths.dtype == np.int64
    assert clip.start_id == encoded.ids[0, 0] == 49406 and clip.end_id == 49407 and clip.vocabulary == 49408
    ends = encoded.ids[np.arange(len(TEXTS)), encoded.lengths - 1]
    assert (ends == clip.end_id).all() and (encoded.ids.argmax(1) == encoded.lengths - 1).all()
    assert encoded.lengths[1] == encoded.lengths[2] == 2, "an empty text is start and end"


def test_one_text_is_no_list_of_letters(clip: Tokenizer) -> None:
    assert clip.encode("a cat").ids.shape == (1, 77)
    assert clip.encode([]).ids.shape == (0, 77)


def test_what_is_cut_is_counted(clip: Tokenizer) -> None:
    cut = clip.encode(["cat " * 75, "cat " * 76, "word " * 200]).cut
    assert cut.tolist() == [0, 1, 125]
    refusing = Tokenizer("clip", 77, too_long="refuse")
    assert refusing.encode("cat " * 75).cut.tolist() == [0]
    with pytest.raises(SampleError, match="78 tokens, the context has 77") as raised:
        refusing.encode(["a cat", "cat " * 76])
    assert raised.value.reason == "text_too_long"


@pytest.mark.parametrize("text", ["a <end_of_text> of it", "<START_OF_TEXT> twice", "&lt;end_of_text&gt;"])
def test_text_that_spells_out_the_end_is_refused(clip: Tokenizer, text: str) -> None:
    """A tower takes the first end for the text's: the rest would be lost without a word."""
    with pytest.raises(SampleError, match="spells out") as raised:
        clip.encode(text)
    assert raised.value.reason == "text_special"


@pytest.mark.parametrize("value", [None, 7, b"bytes"])
def test_only_texts(clip: Tokenizer, value: Any) -> None:
    with pytest.raises(SampleError, match="where a text belongs"):
        clip.encode(["a cat", value])


def test_ids_back_to_text(clip: Tokenizer) -> None:
    for text in TEXTS[:1] + TEXTS[4:7]:
        assert clip.decode(clip.encode(text).ids[0]).replace(" ", "") == text.lower().replace(" ", "")
    assert clip.decode(clip.encode("").ids[0]) == ""


def _in_worker(tokenizer: Tokenizer, queue: Any) -> None:
    queue.put((tokenizer.encode(TEXTS), [name for name in ("open_clip", "torchvision", "timm") if name in sys.modules]))


@pytest.mark.parametrize("kind", ["clip", "file"])
def test_spawned_workers(clip: Tokenizer, kind: str, tmp_path: Path) -> None:
    tokenizer = clip
    if kind == "file":
        path = train(tmp_path)
        tokenizer = Tokenizer(str(path), 20, too_long="cut")
        path.unlink()  # a worker must not depend on when it starts
    assert len(pickle.dumps(tokenizer)) < 10_000
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=_in_worker, args=(tokenizer, queue))
    worker.start()
    found, loaded = queue.get(timeout=120)
    worker.join()
    for ours, theirs in zip(tokenizer.encode(TEXTS), found, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert loaded == [], "a worker carries packages that it doesn't need"


@pytest.mark.parametrize("marks", [("<s>", "</s>"), ("</s>",), ()])
def test_any_file(tmp_path: Path, marks: tuple[str, ...]) -> None:
    path = train(tmp_path, marks)
    library = tokenizers.Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(str(path), 12, too_long="cut")
    assert [tokenizer.start_id, tokenizer.end_id] == {
        2: [1, 2], 1: [None, 1], 0: [None, None],
    }[len(marks)]  # fmt: skip
    assert tokenizer.vocabulary == library.get_vocab_size() and tokenizer.pad_id == 0
    for text in [text for text in TEXTS if "\ud83d" not in text]:
        whole, ours = library.encode(text).ids, tokenizer.encode(text)
        kept = int(ours.lengths[0])
        assert kept + ours.cut[0] == len(whole) and (ours.ids[0, kept:] == 0).all()
        body = slice(0, kept - (tokenizer.end_id is not None))
        assert ours.ids[0, body].tolist() == whole[body], text
        assert tokenizer.end_id is None or ours.ids[0, kept - 1] == tokenizer.end_id
    assert tokenizer.decode(tokenizer.encode("a cat").ids[0]) == "a cat"
    half, whole_text = tokenizer.encode(["x\ud83d", "x�"]).ids
    assert half.tolist() == whole_text.tolist()


def test_truncation_of_the_file_itself_is_counted_too(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(train(tmp_path)))
    library.enable_truncation(4)
    library.enable_padding(length=30, pad_id=2, pad_token="</s>")
    library.save(str(tmp_path / "tokenizer.json"))
    encoded = Tokenizer(str(tmp_path / "tokenizer.json"), 12, too_long="cut").encode("a cat sits on the mat")
    whole = Tokenizer(str(train(tmp_path)), 12, too_long="cut").encode("a cat sits on the mat")
    assert encoded.cut[0] == whole.cut[0] and encoded.lengths[0] == whole.lengths[0] > 4
    assert encoded.ids[0, encoded.lengths[0] :].tolist() == [2] * (12 - int(encoded.lengths[0]))


def test_hugging_face_folder_gives_the_ids_of_open_clip(clip: Tokenizer, tmp_path: Path) -> None:
    """The published CLIP folders on the hub hold this file; it pads with the end, which changes no feature."""
    transformers = pytest.importorskip("transformers")
    pairs = clip._loaded()._tokenizer  # type: ignore[attr-defined]
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in pairs.encoder.items()}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=list(pairs.bpe_ranks)).save_pretrained(tmp_path)
    ours = Tokenizer(str(tmp_path), 77, too_long="cut")
    assert (ours.start_id, ours.end_id, ours.pad_id) == (49406, 49407, 49407)
    texts = [text for text in TEXTS if text.isprintable() and "Ã" not in text and "&" not in text and "„" not in text]
    theirs = clip.encode(texts)
    for row, length in enumerate(theirs.lengths):
        np.testing.assert_array_equal(ours.encode(texts).ids[row, :length], theirs.ids[row, :length], texts[row])
    assert len(texts) > 7


def test_file_on_an_object_store(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/tokens/tokenizer.json", train(tmp_path).read_bytes())
    for source in ("memory://tokens/tokenizer.json", "memory://tokens"):
        assert Tokenizer(source, 9, too_long="cut").encode("a cat").lengths[0] == 4


def test_padding_must_be_known(tmp_path: Path) -> None:
    path = train(tmp_path, extra=())
    with pytest.raises(DataError, match="which token pads"):
        Tokenizer(str(path), 9, too_long="cut")
    assert Tokenizer(str(path), 9, too_long="cut", pad="</s>").pad_id == 1
    with pytest.raises(DataError, match="no token '<blank>'"):
        Tokenizer(str(path), 9, too_long="cut", pad="<blank>")
    with pytest.raises(DataError, match="pads with id 0"):
        Tokenizer("clip", 77, too_long="cut", pad="<end_of_text>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<s>"}}))
    assert Tokenizer(str(tmp_path), 9, too_long="cut").pad_id == 0


@pytest.mark.parametrize(("content", "expected"), [("{}", "no file of the tokenizers"), ("\xff", "no JSON")])
def test_other_files_are_refused(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "t.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=expected):
        Tokenizer(str(tmp_path / "t.json"), 9, too_long="cut")
    with pytest.raises(DataError, match="no such file"):
        Tokenizer(str(tmp_path / "missing.json"), 9, too_long="cut")
    with pytest.raises(DataError, match="no room"):
        Tokenizer("clip", 2, too_long="cut")


@pytest.mark.parametrize("package", ["open_clip", "ftfy", "tokenizers"])
def test_missing_package_names_the_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = train(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=r"pip install 'tubelet\[language\]'"):
        Tokenizer(str(path) if package == "tokenizers" else "clip", 9, too_long="cut")
