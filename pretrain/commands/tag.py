"""The command line of launch/tag.py."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, get_args

from pretrain.commands.pack_arguments import part_of, positive
from pretrain.data.pack.pack_plan import WHOLE
from pretrain.data.tags.caption_parsers import Backend
from pretrain.errors import DataError, RecipeError, TubeletError
from pretrain.runtime.terminal import take_any_name

DESCRIPTION = """\
Make tags of captions: parse them, keep the most frequent tags, note which of them each sample has, and embed the tags
by a CLIP's text tower, for recipes with input.tags (TagAlign).

SHARDS  data sets of launch/pack.py with captions, any fsspec URL; they stay as they are. Run the same command again
        after any interruption: shards that were parsed are skipped. The result is the same on any machine.
"""
EPILOG = """\
examples:
  python launch/tag.py shards/cc12m --out tags/cc12m --clip hub:openai/clip-vit-base-patch16
  python launch/tag.py shards/cc3m shards/cc12m --out tags/both --backend spacy --model en_core_web_sm --part 0/8
  python launch/tag.py shards/own --out tags/own --tag-list tags.txt --synonyms synonyms.csv
  python launch/tag.py --out tags/own --clip clip_folder --set size=L/14

exit code: 0 done (captions without tags are counted, not an error), 1 failed, 2 wrong usage
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    take_any_name()
    arguments = make_parser().parse_args(argv)
    try:
        _tag(arguments)
    except RecipeError as error:
        _say(str(error))
        return 2
    except TubeletError as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        _say("interrupted; the same command continues after the last finished shard")
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Build the parser; every option's help states its default."""
    parser = argparse.ArgumentParser(
        "tag.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="*", metavar="SHARDS", help="data sets with captions; none: only embed")
    parser.add_argument("--out", required=True, metavar="TAGS", help="folder of the tags, any fsspec URL")
    parse = parser.add_argument_group("parse")
    parse.add_argument("--backend", choices=get_args(Backend), default="rules", help="parser (default: rules)")
    parse.add_argument("--model", metavar="PATH", help="of spacy, nltk or llm; nothing is downloaded")
    parse.add_argument("--caption", default="", metavar="NAME", help="which text of a sample (default: the first)")
    parse.add_argument("--part", type=part_of, default=WHOLE, metavar="I/N", help="parse part I (from 0) of N of the "
                       "shards; the last part to end makes the list")  # fmt: skip
    keep = parser.add_argument_group("list")
    keep.add_argument("--tags", type=positive, default=10000, metavar="K", help="most tags (default: 10000)")
    keep.add_argument("--least", type=positive, default=1, metavar="N", help="samples that a tag is in (default: 1)")
    keep.add_argument("--attributes", action="store_true", help="attributes are tags too, in the same list")
    keep.add_argument("--synonyms", metavar="CSV", help="lines of `word,the word that stands for it`")
    keep.add_argument("--tag-list", metavar="FILE", help="take this list, a tag a line, and choose none")
    embed = parser.add_argument_group("embed")
    embed.add_argument("--clip", metavar="WEIGHTS", help="file or folder with the text tower, or hub:owner/name")
    embed.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="its sizes, as model.clip in a recipe "
                       "(default: size=B/16)")  # fmt: skip
    embed.add_argument("--tokenizer", default="clip", help="clip (default), or a tokenizer.json")
    embed.add_argument("--template", metavar="TEXT", help="sentence about a tag (default: a photo of a {}.)")
    return parser


def _tag(arguments: argparse.Namespace) -> None:
    if not arguments.shards and arguments.clip is None:
        raise RecipeError("nothing to do: give SHARDS to parse, or --clip to embed the tags of --out")
    if arguments.shards and not _build(arguments):
        return
    if arguments.clip is not None:
        _embed(arguments)


def _build(arguments: argparse.Namespace) -> bool:
    """Parse, choose, map; tells whether the list is made, which the last part does."""
    from pretrain.data.index import load_index
    from pretrain.data.tags.caption_parsers import open_parser
    from pretrain.data.tags.tag_build import TagWork, choose_tags, map_shards, parse_shards, unparsed
    from pretrain.data.tags.tag_folder import checked_tags

    parser = open_parser(arguments.backend, arguments.model)
    synonyms = _synonyms(arguments.synonyms) if arguments.synonyms else {}
    work = TagWork(arguments.out, arguments.caption, synonyms, arguments.attributes)
    indexes = [load_index(url) for url in arguments.shards]
    parsed = parse_shards(work, indexes, parser, arguments.part, _told)
    every = sum(len(index.shards) for index in indexes)
    _say(f"{parsed} shards parsed by {parser.version}, {every} in all")
    if missing := unparsed(work, indexes, parser.version):
        _say(f"{missing} shards of other parts are not parsed yet; the last part makes the list")
        return False
    if arguments.tag_list:
        tags = checked_tags(_lines(arguments.tag_list), arguments.tag_list)
    else:
        tags = choose_tags(work, indexes, parser.version, arguments.tags, arguments.least)
    _report(map_shards(work, indexes, parser.version, tags))
    return True


def _report(facts: dict[str, Any]) -> None:
    _say(f"{facts['tags']} tags; input.tag_count={facts['tags']}")
    share, each = 100 * facts["coverage"], facts["tags_a_tagged_sample"]
    _say(f"{facts['tagged']} of {facts['samples']} samples have one ({share:.1f} %), {each:.2f} each")
    for reason, count in facts["without"].items():
        _say(f"  {count} without: {reason}")
    _say("most frequent: " + ", ".join(f"{tag} {count}" for tag, count in facts["top"][:10]))


def _embed(arguments: argparse.Namespace) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from pretrain.models.clip import Config, check
    from pretrain.objectives.tag_texts import SIMPLE, embed_tags

    try:
        given = OmegaConf.merge(OmegaConf.structured(Config()), OmegaConf.from_dotlist(arguments.set))
        config: Any = OmegaConf.to_object(given)
    except OmegaConfBaseException as error:
        names = ", ".join(one.name for one in dataclasses.fields(Config))
        raise RecipeError(f"--set {' '.join(arguments.set)}: {str(error).splitlines()[0]}; allowed: {names}") from error
    if problems := check(config, "--set"):
        raise RecipeError(problems)
    tags, cut = embed_tags(arguments.out, arguments.clip, config, arguments.tokenizer, arguments.template or SIMPLE)
    _say(f"{tags} tags embedded by {arguments.clip}")
    if cut:
        _say(f"{cut} of them are longer than the context and were cut")


def _synonyms(path: str) -> dict[str, str]:
    """Read `word,stand-in` lines."""
    found = {}
    for number, line in enumerate(_lines(path), 1):
        word, comma, instead = (part.strip().lower() for part in line.partition(","))
        if line.strip():
            if not (word and comma and instead) or "," in instead:
                raise DataError(f"{path}:{number}: {line!r}; allowed: word,the word that stands for it")
            found[word] = instead
    return found


def _lines(path: str) -> list[str]:
    from pretrain.errors import StorageError
    from pretrain.runtime import storage

    try:
        return storage.read_bytes(path).decode("utf-8-sig").splitlines()
    except (StorageError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from error


def _told(done: int, every: int) -> None:
    _say(f"shard {done} of {every}")


def _say(text: str) -> None:
    sys.stderr.write(f"tag: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
