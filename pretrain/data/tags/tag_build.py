"""From captions in shards to a list of tags and the tags of every sample: resumable shard by shard, the same anywhere.

Three steps (systems/tagalign.md, section 4): `parse_shards` reads captions and writes what a parser says of them, a
file a shard; `choose_tags` counts over all files and keeps the most frequent; `map_shards` writes each sample's
numbers. Only the first takes long; many machines share it by parts. Nothing is drawn at random, and ties go by name.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from pretrain.data.fetch import SampleReader
from pretrain.data.index import Shard, ShardIndex, load_index
from pretrain.data.members import parse_sample
from pretrain.data.pack.pack_plan import WHOLE, Part
from pretrain.data.tags.caption_parsers import CaptionParser
from pretrain.data.tags.caption_rules import ParsedCaption, normalised_tag
from pretrain.data.tags.captions import usable_caption
from pretrain.data.tags.tag_folder import (
    FACTS,
    LIST,
    TagTable,
    list_hash,
    read_table,
    table_path,
    write_table,
)
from pretrain.errors import DataError, SampleError, StorageError
from pretrain.runtime import storage
from pretrain.runtime.untrusted import parse_json

#: Called with (shards done, shards of this run).
Told = Callable[[int, int], None]
DEADLINE_S = 300.0
#: Captions that a parser is given at once.
CAPTIONS = 256
#: Most frequent tags that statistics name.
TOP = 20

#: A sample's answer: what its caption says, or the reason why that is not known.
Answer = ParsedCaption | str


@dataclass(frozen=True)
class TagWork:
    """Place and rules of a list.

    Attributes:
        folder: of tags, any fsspec URL.
        caption: name of the caption among a sample's texts; "": the first.
        synonyms: tag -> the one that stands for it.
        attributes: whether attributes are tags too, in the same list, as in the released code.
    """

    folder: str
    caption: str = ""
    synonyms: dict[str, str] = field(default_factory=dict)
    attributes: bool = False


def parse_shards(
    work: TagWork, indexes: Sequence[ShardIndex], parser: CaptionParser, part: Part = WHOLE,
    told: Told = lambda done, every: None,
) -> int:  # fmt: skip
    """Parse the captions of all shards, less those that were parsed by the same parser already.

    Args:
        work: where to.
        indexes: of the data sets.
        parser: of captions.
        part: shards of this run, every count-th.
        told: called after every shard.

    Returns:
        Shards that were parsed now.

    Raises:
        DataError: the storage does not answer.
    """
    _reader.cache_clear()  # of an earlier call in this process: shards may have changed since
    mine = _shards(indexes)[part.index :: part.count]
    waiting = [one for one in mine if _parsed(work, one[1].shards[one[2]], parser.version) is None]
    for done, (source, index, number) in enumerate(waiting, 1):
        answers = list(_answers(work, index, number, parser))
        lines = [json.dumps({"parser": parser.version, "caption": work.caption, "source": source})]
        lines += [json.dumps(one if isinstance(one, str) else [one.objects, one.attributes]) for one in answers]
        # Whole or absent: a killed run leaves no half file that would be taken for a finished one.
        storage.write_bytes(_parsed_path(work, index.shards[number]), "\n".join(lines).encode())
        told(done, len(waiting))
    return len(waiting)


def unparsed(work: TagWork, indexes: Sequence[ShardIndex], version: str) -> int:
    """Count shards that other parts have not parsed yet."""
    return sum(_parsed(work, index.shards[number], version) is None for _, index, number in _shards(indexes))


def choose_tags(work: TagWork, indexes: Sequence[ShardIndex], version: str, most: int, least: int = 1) -> list[str]:
    """Take the most frequent tags over all samples; equally frequent ones in the order of their names.

    Args:
        most: tags.
        least: samples that a tag must be in.

    Raises:
        DataError: no caption has any.
    """
    counts: Counter[str] = Counter()
    for _, index, number in _shards(indexes):
        for answer in _parsed(work, index.shards[number], version) or []:
            if not isinstance(answer, str):
                counts.update(set(tags_of(work, answer)))
    kept = sorted((tag for tag, count in counts.items() if count >= least), key=lambda tag: (-counts[tag], tag))[:most]
    if not kept:
        places = ", ".join(index.url for index in indexes)
        raise DataError(f"no tag in the captions of {places} that {least} samples have")
    return kept


def map_shards(work: TagWork, indexes: Sequence[ShardIndex], version: str, tags: Sequence[str]) -> dict[str, object]:
    """Write the list and each sample's numbers, and statistics of them.

    Returns:
        Statistics: samples, how many have a tag, tags a picture, the most frequent ones, why others have none.
    """
    numbers, tags_sha256 = {tag: number for number, tag in enumerate(tags)}, list_hash(tags)
    counts: Counter[int] = Counter()
    reasons: Counter[str] = Counter()
    samples = 0
    for _, index, number in _shards(indexes):
        shard = index.shards[number]
        answers = _parsed(work, shard, version) or []
        rows = [sorted({numbers[tag] for tag in _known(work, answer) if tag in numbers}) for answer in answers]
        told = [_reason(answer, row) for answer, row in zip(answers, rows, strict=True)]
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        table = TagTable(offsets, np.array([one for row in rows for one in row], dtype=np.int32), told)
        if not _same_table(work, shard, table, tags_sha256):
            write_table(work.folder, shard, table, tags_sha256)
        counts.update(one for row in rows for one in row)
        reasons.update(reason for reason in told if reason)
        samples += len(rows)
    tagged = samples - sum(reasons.values())
    facts: dict[str, object] = {
        "tags": len(tags), "tags_sha256": tags_sha256, "parser": version, "attributes": work.attributes,
        "synonyms": len(work.synonyms), "samples": samples, "tagged": tagged, "coverage": tagged / max(samples, 1),
        "tags_a_tagged_sample": sum(counts.values()) / max(tagged, 1), "without": dict(sorted(reasons.items())),
        "top": [[tags[number], counts[number]] for number in sorted(counts, key=lambda one: (-counts[one], one))[:TOP]],
        "data": [[index.url, index.fingerprint] for index in indexes],
    }  # fmt: skip
    storage.write_bytes(storage.join(work.folder, FACTS), (json.dumps(facts, indent=1) + "\n").encode())
    # Last: a folder whose list can be read has all tables.
    storage.write_bytes(storage.join(work.folder, LIST), "".join(f"{tag}\n" for tag in tags).encode())
    return facts


def tags_of(work: TagWork, parsed: ParsedCaption) -> Iterator[str]:
    """Give the tags of a caption, in one form; one may come twice."""
    words = [*parsed.objects, *(word for _, word in parsed.attributes if work.attributes)]
    for word in words:
        if (tag := normalised_tag(word, work.synonyms)) is not None:
            yield tag


def _known(work: TagWork, answer: Answer) -> list[str]:
    return [] if isinstance(answer, str) else list(tags_of(work, answer))


def _reason(answer: Answer, row: list[int]) -> str:
    if row:
        return ""
    return answer if isinstance(answer, str) else "no_tag_of_the_list" if answer.objects else "no_object"


def _same_table(work: TagWork, shard: Shard, table: TagTable, tags_sha256: str) -> bool:
    """Tell whether the table is there already, so that a run that is repeated writes nothing."""
    try:
        there = read_table(work.folder, shard, tags_sha256)
    except DataError:
        return False
    return (
        np.array_equal(there.offsets, table.offsets)
        and np.array_equal(there.numbers, table.numbers)
        and there.reasons == table.reasons
    )


def _shards(indexes: Sequence[ShardIndex]) -> list[tuple[str, ShardIndex, int]]:
    return [(index.url, index, number) for index in indexes for number in range(len(index.shards))]


def _parsed_path(work: TagWork, shard: Shard) -> str:
    name = table_path(work.folder, shard).rpartition("/")[2].removesuffix(".npz")
    return storage.join(work.folder, "parsed", f"{name}.jsonl")


def _parsed(work: TagWork, shard: Shard, version: str) -> list[Answer] | None:
    """Read what was parsed of a shard; None where it was not, by another parser, or of another text."""
    where = _parsed_path(work, shard)
    try:
        if not storage.exists(where):
            return None
        head, *lines = storage.read_bytes(where).decode().split("\n")
        facts = parse_json(head)
        if (facts["parser"], facts["caption"]) != (version, work.caption) or len(lines) != shard.samples:
            return None
        return [_answer(parse_json(line)) for line in lines]
    except StorageError as error:
        raise DataError(f"{where}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: damaged ({error}); remove it and run again") from error


def _answer(found: object) -> Answer:
    if isinstance(found, str):
        return found
    assert isinstance(found, list)
    return ParsedCaption(found[0], [(thing, word) for thing, word in found[1]])


def _answers(work: TagWork, index: ShardIndex, number: int, parser: CaptionParser) -> Iterator[Answer]:
    rows = [_caption(work, index.url, number, row) for row in range(index.shards[number].samples)]
    for start in range(0, len(rows), CAPTIONS):
        some = rows[start : start + CAPTIONS]
        parsed = iter(parser([text for text, reason in some if not reason]))
        for _, reason in some:
            found = None if reason else next(parsed)
            yield reason or ("unparsed" if found is None else found)


def _caption(work: TagWork, url: str, shard: int, row: int) -> tuple[str, str]:
    """Read a sample's caption: the text, or "" and why it can't be used."""
    try:
        return usable_caption(parse_sample(_reader(url).read(0, shard, row)).text(work.caption)), ""
    except SampleError as error:
        return "", error.reason


@functools.lru_cache(maxsize=1)
def _reader(url: str) -> SampleReader:
    return SampleReader([load_index(url)], None, DEADLINE_S, tables=2)
