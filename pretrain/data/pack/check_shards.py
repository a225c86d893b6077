"""Verify a data set: hashes, member tables, sample json, and that every member decodes to what its json states."""

import functools
import json
import logging
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO

import numpy as np

from pretrain.data.decoders import open_video
from pretrain.data.index import MemberTable, Shard, describe_unhashed, load_index, load_members
from pretrain.data.linked_video import LinkedVideo, VideoFile, open_link
from pretrain.data.media import KINDS, LINK_ENDING, SPAN_ENDING, Kind, extension_of, kind_of_ending, main_member
from pretrain.data.members import Members
from pretrain.data.pack.class_masks import check_mask, is_mask
from pretrain.data.pack.contents import describe
from pretrain.data.pack.pool import OrderedPool
from pretrain.data.pack.scan import scan_shard
from pretrain.data.pack.verify import Signatures, check_random_reads, sequential_signatures, signature
from pretrain.errors import SampleError, TubeletError
from pretrain.runtime import storage
from pretrain.runtime.untrusted import SAMPLE_JSON_BYTES, name_text, parse_json

logger = logging.getLogger(__name__)

READS = 6
#: Decoder that reads linked films by ranges.
RANGED = "pyav"
#: Frames of a linked film that are decoded at once.
FRAMES = 64
#: Longest time of reading a linked file, seconds.
DEADLINE_S = 300.0
#: Reads what a kind of sample needs of the members; raises SampleError for what training would refuse.
Inspect = Callable[[Members], object]
_TOLD: set[str] = set()


def check_folder(
    url: str, workers: int = 0, decoders: tuple[str, ...] | None = (), inspect: Inspect | None = None
) -> Iterator[str]:
    """List every problem of the data set at `url`, one line each, as they are found.

    Args:
        url: folder with index.json and shards.
        workers: processes, each with a shard at a time; 0 checks in this one.
        decoders: which must read random frames exactly; () decodes in sequence only, None decodes nothing.
        inspect: what else is asked of each sample, by a function that workers can import; not with `decoders` None.

    Raises:
        DataError: there is no readable index.
    """
    index = load_index(url)
    if not index.is_hashed:
        logger.warning(describe_unhashed(url))
    known = {shard.name for shard in index.shards}
    for name in storage.find(url):
        if name.endswith(".tar") and name not in known:
            yield f"{storage.join(url, name)}: not in the index; index again with --index-only, or delete it"
    check = functools.partial(check_shard, url, decoders=decoders, inspect=inspect)
    pool: OrderedPool[Shard, list[str]] = OrderedPool(check, functools.partial(_crashed, url), workers)
    for problems in pool.map(index.shards):
        yield from problems


def _crashed(url: str, shard: Shard) -> list[str]:
    return [f"{storage.join(url, shard.name)}: a member of it kills the process that decodes it"]


def check_shard(url: str, shard: Shard, decoders: tuple[str, ...] | None, inspect: Inspect | None = None) -> list[str]:
    """List the problems of one shard."""
    where = storage.join(url, shard.name)
    problems: list[str] = []
    try:
        found, members, _ = scan_shard(url, shard.name)
        if found.bytes != shard.bytes:
            problems.append(f"{where}: {found.bytes} bytes, the index says {shard.bytes}")
        elif found.sha256 != shard.sha256:
            problems.append(f"{where}: sha256 {found.sha256[:12]}..., the index says {shard.sha256[:12]}...")
        if found.samples != shard.samples:
            problems.append(f"{where}: {found.samples} samples, the index says {shard.samples}")
        problems += _check_members(url, shard, members)
    except TubeletError as error:
        # Not readable as a whole: its members would all fail with the same words.
        return [*problems, str(error)]
    if decoders is not None:
        for number, key in enumerate(members.keys):
            span = int(members.offsets[number]), int(members.sizes[number])
            problems += _check_sample(where, key, *span, decoders, inspect)
    return problems


def _check_members(url: str, shard: Shard, found: MemberTable) -> list[str]:
    try:
        stored = load_members(url, shard)
    except TubeletError as error:
        return [str(error)]
    same = list(found.keys) == list(stored.keys) and found.offsets.tolist() == stored.offsets.tolist()
    if same and found.sizes.tolist() == stored.sizes.tolist():
        return []
    return [f"{storage.join(url, shard.name)}: its member table does not match the tar; index again with --index-only"]


def _check_sample(
    where: str, key: str, offset: int, size: int, decoders: tuple[str, ...], inspect: Inspect | None
) -> list[str]:
    try:
        files, facts = _read_sample(storage.read_bytes(where, offset, offset + size))
        if inspect is not None:
            inspect(Members(files | {"json": json.dumps(facts).encode()}, key, where))
        kinds = {ending: kind_of_ending(ending) for ending in files}
        main = _main_member(kinds, facts.get("member"))
        for ending, content in files.items():
            if ending != main or kinds[ending] != "video":
                _check_member(ending, content, facts if ending == main else {}, kinds)
        if main is not None and kinds[main] == "image":
            _check_masks(files, main)
        if main is None or kinds[main] != "video":
            return []
        video = files[main]
        signatures = _signatures(video)
        stated = facts.get("frames")
        if isinstance(stated, int) and stated != len(signatures):
            raise SampleError("frames", f"{len(signatures)} frames decode, its json says {stated}")
        for decoder in _ranged(video, decoders):
            check_random_reads(video, signatures, decoder, READS, key)
    except (TubeletError, ValueError, tarfile.TarError) as error:
        return [f"{where}: sample {key!r}: {error}"]
    return []


def _ranged(video: VideoFile, decoders: tuple[str, ...]) -> tuple[str, ...]:
    """Leave out the decoders that would read a whole film for each of its segments."""
    if not isinstance(video, LinkedVideo) or video.span.segment is None:
        return decoders
    left_out = [decoder for decoder in decoders if decoder != RANGED]
    if left_out and not _TOLD:
        _TOLD.add(video.url)
        logger.warning(
            "segments in place are read with %s only: %s would read all of a film for each", RANGED, left_out
        )
    return tuple(decoder for decoder in decoders if decoder == RANGED)


def _main_member(kinds: dict[str, Kind | None], stated: object) -> str | None:
    """Find the member that the json describes; without a word in it, a video with a picture beside it is a video."""
    if isinstance(stated, str) and stated in kinds:
        return stated
    found = ([ending for ending, one in kinds.items() if one == kind] for kind in KINDS)
    return next((main_member(endings, None) for endings in found if endings), None)


def _check_member(ending: str, content: VideoFile, facts: dict[str, object], kinds: dict[str, Kind | None]) -> None:
    """Decode a member and compare it with what the sample's json states of its main one.

    Raises:
        SampleError: it is damaged, or "differs".
    """
    if kinds[ending] == "text" and set(kinds.values()) - {"text", None}:
        return  # captions of others may be empty, or in any encoding: that is their own affair
    try:
        assert isinstance(content, bytes), "only videos are linked by ranges"
        found = describe(ending, content)
    except SampleError as error:
        raise SampleError(error.reason, f"{ending}: {str(error).removeprefix(f'{error.reason}: ')}") from error
    for name, value in found.items():
        if name in facts and facts[name] != value:
            raise SampleError("differs", f"{ending} has {name} {value}, its json says {facts[name]}")


def _check_masks(files: Mapping[str, VideoFile], main: str) -> None:
    """Hold masks of classes against their picture, whatever its json says of it.

    Raises:
        SampleError: "mask" or "decode".
    """
    for ending in filter(is_mask, files):
        picture, mask = files[main], files[ending]
        assert isinstance(picture, bytes) and isinstance(mask, bytes), "only videos are linked by ranges"
        size = describe(main, picture)
        check_mask(mask, size["width"], size["height"])


def _signatures(video: VideoFile) -> Signatures:
    """Sum up all frames; those of a linked film or segment by PyAV, some at a time, since it may be long."""
    if isinstance(video, LinkedVideo):
        with open_video(video, RANGED) as reader:
            parts = np.array_split(np.arange(reader.num_frames), -(-reader.num_frames // FRAMES))
            return np.stack([signature(frame) for part in parts for frame in reader.frames(part)])
    with tempfile.NamedTemporaryFile(suffix=".video") as file:
        file.write(video)
        file.flush()
        return sequential_signatures(file.name)


def _read_sample(data: bytes) -> tuple[dict[str, VideoFile], dict[str, object]]:
    """Read members by ending, and the json (empty without), out of the tar members of one sample."""
    from webdataset.tariterators import base_plus_ext

    files: dict[str, VideoFile] = {}
    facts: dict[str, object] = {}
    links: dict[str, bytes] = {}
    with tarfile.open(fileobj=BytesIO(data), mode="r:") as tar:
        for member in tar:
            file = tar.extractfile(member)
            extension = (base_plus_ext(member.name)[1] or "").lower()
            if file is None:
                continue
            if extension in (LINK_ENDING, SPAN_ENDING):
                links[extension] = file.read()
            elif extension == "json":
                content = parse_json(file.read(), SAMPLE_JSON_BYTES)
                facts = content if isinstance(content, dict) else {}
            else:
                files[extension] = file.read()
    if LINK_ENDING in links:
        where = name_text(links[LINK_ENDING])
        files[extension_of(where)] = open_link(where, links.get(SPAN_ENDING), DEADLINE_S)
    return files, facts
