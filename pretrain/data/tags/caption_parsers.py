"""Parsers of captions behind one interface: rules, spaCy, NLTK, or a language model that lies in a local folder.

All but the rules are optional packages, whose models are read from a path and never downloaded.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

from pretrain.data.tags.caption_rules import ParsedCaption, RuleParser, singular
from pretrain.errors import DataError
from pretrain.runtime.untrusted import parse_json
from pretrain.runtime.vision_ops import ensure_torchvision

Backend = Literal["rules", "spacy", "nltk", "llm"]

#: What a language model is asked; its answer must be the JSON object alone, or hold one.
PROMPT = """\
List the physical objects in an image caption, and the attributes that describe them. Answer with one JSON object and \
nothing else: {{"objects": ["object", ...], "attributes": [["object", "attribute"], ...]}}. Singular nouns, lower case.
Caption: A black cat sits on two wooden benches.
{{"objects": ["cat", "bench"], "attributes": [["cat", "black"], ["bench", "wooden"]]}}
Caption: {caption}
"""
#: Longest answer, tokens: twenty objects with as many attributes.
ANSWER_TOKENS = 256


class CaptionParser(Protocol):
    """What finds objects and attributes."""

    name: str
    version: str
    """all that its answers depend on: what was parsed by another one is parsed again"""

    def __call__(self, captions: Sequence[str]) -> list[ParsedCaption | None]:
        """Parse captions; None for one without an answer that can be used, which is counted."""
        ...


def open_parser(backend: Backend, model: str | None) -> CaptionParser:
    """Open a parser.

    Args:
        backend: which.
        model: spacy: name of an installed pipeline, or its folder; nltk: folder with its data; llm: folder of a
            transformers model.

    Raises:
        DataError: a package or a model is missing.
    """
    if backend == "rules":
        if model is not None:
            raise DataError(f"--model {model}: the backend rules has none; allowed with spacy, nltk, llm")
        return RuleParser()
    if model is None:
        raise DataError(f"--backend {backend}: needs --model PATH; nothing is downloaded")
    kinds: dict[str, Callable[[str], CaptionParser]] = {
        "spacy": _SpacyParser, "nltk": _NltkParser, "llm": _ModelParser
    }  # fmt: skip
    return kinds[backend](model)


class _SpacyParser:
    """Dependencies: heads of noun chunks are objects, their `amod` and `compound` children attributes."""

    name = "spacy"

    def __init__(self, model: str) -> None:
        try:
            import spacy
        except ImportError as error:
            raise DataError("--backend spacy: needs spaCy; pip install spacy, and a pipeline beside it") from error
        try:
            self._pipeline: Any = spacy.load(model)
        except OSError as error:
            raise DataError(f"--model {model}: no pipeline of spaCy ({error})") from error
        self.version = f"spacy {spacy.__version__} {self._pipeline.meta['name']} {self._pipeline.meta['version']}"

    def __call__(self, captions: Sequence[str]) -> list[ParsedCaption | None]:
        return [self._parsed(text) for text in self._pipeline.pipe(captions)]

    def _parsed(self, text: Any) -> ParsedCaption:
        heads = [chunk.root for chunk in text.noun_chunks if chunk.root.pos_ in ("NOUN", "PROPN")]
        attributes = [
            (head.lemma_.lower(), child.lemma_.lower())
            for head in heads
            for child in head.children
            if child.dep_ in ("amod", "compound")
        ]
        return ParsedCaption([head.lemma_.lower() for head in heads], attributes)


class _NltkParser:
    """Parts of speech: the last of neighbouring nouns is the object; adjectives, participles, nouns before describe it.

    Args:
        model: folder with NLTK's data.
    """

    name = "nltk"

    def __init__(self, model: str) -> None:
        try:
            import nltk
        except ImportError as error:
            raise DataError("--backend nltk: needs NLTK; pip install nltk") from error
        nltk.data.path.insert(0, model)
        self._tokenize: Callable[..., Any] = nltk.wordpunct_tokenize
        self._tag: Callable[..., Any] = nltk.pos_tag
        try:
            self._tag(["cat"])
        except LookupError as error:
            raise DataError(
                f"--model {model}: no averaged_perceptron_tagger_eng below it; NLTK's data are read from there"
            ) from error
        self.version = f"nltk {nltk.__version__} averaged_perceptron_tagger_eng"

    def __call__(self, captions: Sequence[str]) -> list[ParsedCaption | None]:
        return [chained(self._tag(self._tokenize(caption))) for caption in captions]


def chained(tagged: Sequence[tuple[str, str]]) -> ParsedCaption:
    """Read objects and attributes off words with parts of speech (Penn Treebank)."""
    objects: list[str] = []
    attributes: list[tuple[str, str]] = []
    nouns: list[str] = []
    described: list[str] = []
    for word, part in [*tagged, ("", "END")]:
        if part.startswith("NN"):
            nouns.append(word.lower())
            continue
        if nouns:
            thing = singular(nouns[-1])
            objects.append(thing)
            attributes += ((thing, one) for one in (*described, *nouns[:-1]))
            nouns, described = [], []
        if part.startswith("JJ") or part in ("VBG", "VBN"):
            described.append(word.lower())
        else:
            described = []
    return ParsedCaption(objects, attributes)


class _ModelParser:
    """A language model of transformers, asked greedily, so that the same caption gets the same answer.

    Args:
        model: folder with weights, configuration and tokenizer.
    """

    name = "llm"

    def __init__(self, model: str) -> None:
        ensure_torchvision()  # which transformers imports, and which may have no operators for this torch
        try:
            import transformers
        except ImportError as error:
            raise DataError("--backend llm: needs transformers; pip install 'tubelet[hf]'") from error
        try:
            # A path alone: a name would be looked for on the hub.
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(model, local_files_only=True).eval()
        except (OSError, ValueError) as error:
            raise DataError(f"--model {model}: no language model of transformers in it ({error})") from error
        self.version = f"llm {self._model.config.model_type} {_digest(self._model)}"

    def __call__(self, captions: Sequence[str]) -> list[ParsedCaption | None]:
        return [read_answer(self._ask(caption)) for caption in captions]

    def _ask(self, caption: str) -> str:
        import torch

        # One at a time: padding beside other captions would change the answer in its last digits.
        given = self._tokenizer(PROMPT.format(caption=caption), return_tensors="pt")
        with torch.no_grad():
            found = self._model.generate(
                given["input_ids"], attention_mask=given["attention_mask"], do_sample=False,
                max_new_tokens=ANSWER_TOKENS, pad_token_id=self._tokenizer.pad_token_id or 0,
            )  # fmt: skip
        answer: str = self._tokenizer.decode(found[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer


def read_answer(answer: str) -> ParsedCaption | None:
    """Read a language model's answer; None where it holds no object of the form asked for."""
    for start in re.finditer(r"\{", answer):
        for end in _ends(answer, start.start()):
            try:
                found = parse_json(answer[start.start() : end])
            except ValueError:
                continue
            return _of_form(found)
    return None


def _ends(answer: str, start: int) -> Iterator[int]:
    yield from (match.end() for match in re.finditer(r"\}", answer) if match.end() > start)


def _of_form(found: Any) -> ParsedCaption | None:
    objects, attributes = found.get("objects"), found.get("attributes", [])
    if not isinstance(objects, list) or not isinstance(attributes, list):
        return None
    pairs = all(isinstance(one, list) and len(one) == 2 and all(isinstance(word, str) for word in one)
                for one in attributes)  # fmt: skip
    if not pairs or not all(isinstance(one, str) for one in objects):
        return None
    return ParsedCaption(objects, [(thing, word) for thing, word in attributes])


def _digest(model: Any) -> str:
    from pretrain.runtime.tensors import weights_digest

    return weights_digest(model.state_dict())[:16]
