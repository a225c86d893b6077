"""Texts to token ids: open_clip's byte-pair encoding, or any tokenizer.json of the `tokenizers` library.

Data workers hold a `Tokenizer` and call `encode`; nothing is cut from a text without being counted.
"""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pretrain.errors import DataError, SampleError
from pretrain.runtime import storage
from pretrain.runtime.untrusted import parse_json

#: The tokenizer that ships with open_clip: 49,408 ids, lower case, what every published CLIP of OpenAI and LAION reads.
CLIP = "clip"
EXTRA = "pip install 'tubelet[language]'"
#: Names of padding in tokenizer files that don't say which token it is.
PADDING = ("<pad>", "[PAD]")

Ids = npt.NDArray[np.int64]


class Encoded(NamedTuple):
    """Token ids of B texts, L = the context."""

    ids: Ids
    """[B, L], each text between start and end, then padding"""
    lengths: Ids
    """[B], with start and end"""
    cut: Ids
    """[B], tokens that were dropped from the text's end"""


class Backend(Protocol):
    """A vocabulary; `start`, `end`, `pad` and `unknown` are ids, None where it has none."""

    size: int
    start: int | None
    end: int | None
    pad: int | None
    unknown: int | None

    def ids(self, text: str) -> list[int]:
        """Encode a text, without start and end."""

    def text(self, ids: list[int]) -> str:
        """Decode ids: the inverse of `ids`, as far as there is one."""


class Tokenizer:
    """Encoder of texts to arrays of one length; picklable, for spawned data workers.

    Args:
        source: `clip`, or a tokenizer.json (or a folder with one), any fsspec URL.
        context: tokens of a text with start and end, L.
        too_long: fate of longer texts. `cut`: the first tokens are kept and `Encoded.cut` counts the others; `refuse`:
            a SampleError, so that the stream replaces the sample and counts that.
        pad: token behind a text's end; null: as the file, or tokenizer_config.json beside it, has it. Not for `clip`,
            which pads with 0 as open_clip does.

    Attributes:
        start_id, end_id: around each text, None where the file adds none.
        pad_id: behind it.
        unknown_id: of what its vocabulary has no token for, None where it has none.
        vocabulary: number of ids; a text tower needs as many.

    Raises:
        DataError: no such file, none that the library reads, a package is missing, or a pad for `clip`.
    """

    def __init__(
        self, source: str = CLIP, context: int = 77, *, too_long: Literal["cut", "refuse"], pad: str | None = None
    ) -> None:
        if source == CLIP and pad is not None:
            raise DataError(f"tokenizer={CLIP}, pad={pad!r}: it pads with id 0, as open_clip does; leave pad out")
        self.source, self.context, self.too_long = source, context, too_long
        self._content, stated = ("", None) if source == CLIP else _read(source)
        self._pad = pad or stated
        self._backend: Backend | None = None
        backend = self._loaded()
        self.start_id, self.end_id, self.vocabulary = backend.start, backend.end, backend.size
        self.pad_id, self.unknown_id = _pad_id(backend, source), backend.unknown
        self._around = sum(mark is not None for mark in (self.start_id, self.end_id))
        if context <= self._around:
            raise DataError(f"tokenizer={source}: a context of {context} has no room between start and end of a text")

    def __getstate__(self) -> dict[str, Any]:
        # A worker builds its own: open_clip's holds compiled patterns and a cache that grows.
        return vars(self) | {"_backend": None}

    def encode(self, texts: str | Sequence[str]) -> Encoded:
        """Encode texts, which may be empty.

        Raises:
            SampleError: too long where that is refused, no string, or a text that spells out the start or end token,
                which a tower would take for the text's end.
        """
        texts = [texts] if isinstance(texts, str) else texts
        ids = np.full((len(texts), self.context), self.pad_id, np.int64)
        lengths, cut = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64)
        for row, text in enumerate(texts):
            found = self._ids(text)
            kept = found[: self.context - self._around]
            cut[row] = len(found) - len(kept)
            if cut[row] and self.too_long == "refuse":
                raise SampleError(
                    "text_too_long",
                    f"{len(found) + self._around} tokens, the context has {self.context}: {_short(text)}",
                )
            whole = [mark for mark in (self.start_id, *kept, self.end_id) if mark is not None]
            lengths[row] = len(whole)
            ids[row, : len(whole)] = whole
        return Encoded(ids, lengths, cut)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids up to the first end; without start, end, and padding behind."""
        body: list[int] = []
        for index, value in enumerate(int(value) for value in ids):
            if value == self.end_id and index:
                break
            if index or value != self.start_id:
                body.append(value)
        while self.end_id is None and body and body[-1] == self.pad_id:
            body.pop()
        return self._loaded().text(body)

    def _ids(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise SampleError("text_type", f"a {type(text).__name__} where a text belongs")
        found = self._loaded().ids(text)
        if self.start_id in found or self.end_id in found:
            raise SampleError("text_special", f"spells out the start or end token: {_short(text)}")
        return found

    def _loaded(self) -> Backend:
        if self._backend is None:
            self._backend = _BytePairs() if self.source == CLIP else _File(self.source, self._content, self._pad)
        return self._backend


class _BytePairs:
    """open_clip's SimpleTokenizer: repaired (ftfy), unescaped, lower case, then byte pairs."""

    def __init__(self) -> None:
        self._tokenizer = open_clip_module("tokenizer", f"tokenizer={CLIP}: its vocabulary ships").SimpleTokenizer()
        self.size = int(self._tokenizer.vocab_size)
        self.start: int | None = int(self._tokenizer.sot_token_id)
        self.end: int | None = int(self._tokenizer.eot_token_id)
        # As open_clip pads. 0 is the id of "!" as well, so `lengths` or the end tell what is padding, and not the id.
        self.pad: int | None = 0
        self.unknown: int | None = None  # bytes stand for whatever it has no word for

    def ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text)
        return found

    def text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids)).strip()


class _File:
    """A tokenizer.json; its own truncation and padding are switched off, since they would not be counted."""

    def __init__(self, source: str, content: str, pad: str | None) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(f"tokenizer={source}: needs the tokenizers library; {EXTRA}") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"tokenizer={source}: no file of the tokenizers library ({error})") from error
        self.size = int(self._tokenizer.get_vocab_size())
        self.pad = self._find_pad(source, pad)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.start, self.end = self._marks(source)
        # Models of the library's other kinds know their unknown token by its number alone, and don't tell it.
        name = getattr(self._tokenizer.model, "unk_token", None)
        self.unknown: int | None = None if name is None else self._tokenizer.token_to_id(name)

    def ids(self, text: str) -> list[int]:
        # Half of an emoji, as cut captions end with, is no Unicode: the replacement character stands for it.
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # Start and end are put around the text after it was cut, or a long text would lose its end.
        found: list[int] = self._tokenizer.encode(clean, add_special_tokens=False).ids
        return found

    def text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))

    def _find_pad(self, source: str, pad: str | None) -> int | None:
        if pad is not None:
            found = self._tokenizer.token_to_id(pad)
            if found is None:
                raise DataError(f"tokenizer={source}: its vocabulary has no token {pad!r} to pad with")
            return int(found)
        if self._tokenizer.padding is not None:
            return int(self._tokenizer.padding["pad_id"])
        known = (self._tokenizer.token_to_id(name) for name in PADDING)
        return next((int(found) for found in known if found is not None), None)

    def _marks(self, source: str) -> tuple[int | None, int | None]:
        """Find what the file's post-processor puts in front of a text and behind it."""
        # By a trial, since post-processors are of many kinds and none of them tells its marks.
        encoding = self._tokenizer.encode("a")
        body = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
        if not body:
            raise DataError(
                f"tokenizer={source}: its vocabulary has no token for the letter a, nor one for the unknown"
            )
        front, behind = encoding.ids[: body[0]], encoding.ids[body[-1] + 1 :]
        if len(front) > 1 or len(behind) > 1:
            raise DataError(f"tokenizer={source}: adds {front} and {behind} to a text; one token on each side at most")
        return next(iter(front), None), next(iter(behind), None)


def open_clip_module(name: str, what: str) -> ModuleType:
    """Load one file of open_clip alone: the package imports timm, torchvision and more, 100 MB in each worker.

    Args:
        name: of the file.
        what: is looked for in it, for the message: "the names ship".

    Raises:
        DataError: open_clip, or what that file needs, is not installed.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or package.submodule_search_locations is None:
        raise DataError(f"{what} with open_clip; {EXTRA}")
    place = Path(package.submodule_search_locations[0]) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"open_clip_{name}", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise DataError(f"{what} with open_clip, whose {name}.py can't be imported: {error}; {EXTRA}") from error
    return module


def _read(source: str) -> tuple[str, str | None]:
    """Read a tokenizer.json, and the padding token that a Hugging Face folder's tokenizer_config.json states."""
    fs, inner = storage.filesystem(source)
    where = storage.join(source, "tokenizer.json") if fs.isdir(inner) else source
    if not storage.exists(where):
        raise DataError(
            f"tokenizer={source}: no such file. Allowed: {CLIP}, or a tokenizer.json (or a folder with one), any URL"
        )
    content = _json(source, where)
    beside = storage.join(source, "tokenizer_config.json")
    # A tokenizer.json often leaves out which token pads; the file beside it has it.
    pad = parse_json(_json(source, beside)).get("pad_token") if where != source and storage.exists(beside) else None
    return content, pad["content"] if isinstance(pad, dict) else pad


def _json(source: str, where: str) -> str:
    try:
        content = storage.read_bytes(where).decode()
        parse_json(content)
    except ValueError as error:
        raise DataError(f"tokenizer={source}: {where} is no JSON ({error})") from error
    return content


def _pad_id(backend: Backend, source: str) -> int:
    if backend.pad is None:
        raise DataError(f"tokenizer={source}: the file doesn't say which token pads; name one (pad)")
    return backend.pad


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
