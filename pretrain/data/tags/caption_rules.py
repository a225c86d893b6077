"""Objects and attributes of captions by rules alone: a tokeniser, closed classes of words, endings. No download.

What it knows of English are its closed classes (articles, prepositions, pronouns, auxiliaries, numbers), words that are
mostly adjectives, and endings. A word that is left over is taken for a noun; of neighbouring nouns the last is the
object and those in front describe it ("fire truck": truck, fire). So it finds more than a tagger would; rare mistakes
fall out of a list of the most frequent tags. systems/tagalign.md, section 4: backend `rules`, our own design.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*|\d+|[^\w\s]")

#: Words that end a chain of nouns and are no tag.
CLOSED = frozenset("""
a an the this that these those some any each every all both no another other such own same
i you he she it we they me him her us them my your his its our their mine yours hers ours theirs who whom whose which
what there here where when while why how
and or but nor so yet if than then as because although though
of in on at by for with from to into onto over under above below behind between among through across along around near
inside outside off up down out about against toward towards without within during before after until since beside upon
next front top bottom side middle left right
is are was were be been being am do does did done has have had having can could will would shall should may might must
get gets got getting go goes going gone come comes coming came make makes made making take takes taking took put puts
not very too also just only more most less least much many few several lots lot quite really almost still even ever
one two three four five six seven eight nine ten eleven twelve hundred thousand first second third dozen
sit sits sat stand stands stood lie lies lay walk walks walked run runs ran ride rides rode hold holds held look looks
looked play plays played eat eats ate wear wears wore fly flies flew swim swims swam show shows showed hang hangs hung
jump jumps jumped lean leans leaned wait waits waited watch watches drive drives drove throw throws threw use uses used
""".split())
#: Words that are mostly adjectives. Those that are nouns as well (orange, silver) are not among them: in front of a
#: noun they describe it all the same.
ADJECTIVES = frozenset("""
black white red green blue yellow brown grey gray purple pink golden dark bright pale colorful
colourful big small large little huge tiny tall short long wide narrow thick thin high low deep fat
old new young ancient modern vintage antique fresh ripe raw cooked fried baked roasted grilled sliced
wooden woolen
beautiful pretty cute lovely nice good great best happy sad angry funny cool hot warm cold wet dry clean dirty dusty
empty full open closed broken round flat curved straight sharp soft hard smooth rough shiny striped spotted
furry fluffy hairy wild tame domestic tropical rural urban sunny cloudy rainy snowy foggy misty stormy
elderly pregnant american european asian african chinese japanese french italian english
real fake famous popular traditional typical classic simple different various single double whole half main
busy quiet loud fast slow heavy strong weak rich poor expensive cheap free safe dangerous
""".split())
#: Tags that say how a picture was made and not what is in it.
STOP_TAGS = frozenset("""
photo photograph photography picture image img pic background foreground view shot closeup close-up scene stock
illustration vector drawing painting sketch icon design logo wallpaper clipart render portrait art artwork
thing things something stuff kind type sort part piece bit way group set pair bunch number lot
time day night morning evening year month week today yesterday tomorrow moment
""".split())
#: Plurals and forms that endings don't tell.
IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "geese": "goose", "mice": "mouse", "oxen": "ox", "leaves": "leaf", "knives": "knife", "wives": "wife",
    "wolves": "wolf", "halves": "half", "shelves": "shelf", "loaves": "loaf", "calves": "calf", "scarves": "scarf",
    "hooves": "hoof", "cacti": "cactus", "fungi": "fungus", "dice": "die", "lives": "life", "thieves": "thief",
    "buses": "bus", "potatoes": "potato", "tomatoes": "tomato", "heroes": "hero", "mosquitoes": "mosquito",
    "shoes": "shoe", "toes": "toe", "canoes": "canoe", "movies": "movie", "cookies": "cookie",
    "zombies": "zombie", "ties": "tie", "pies": "pie", "lenses": "lens", "gases": "gas", "axes": "axe",
}  # fmt: skip
#: Words in -s that are no plurals.
SINGULAR = frozenset("""
bus gas lens glass grass dress cross class bass moss mattress chess canvas christmas iris cactus octopus walrus
hippopotamus rhinoceros citrus virus campus circus bonus species series tennis news pants jeans trousers shorts
scissors glasses binoculars goggles headphones stairs clothes asparagus hibiscus eucalyptus crocus lotus atlas
compass harness fortress
""".split())
#: Nouns that end like adjectives.
ADJECTIVE_NOUNS = frozenset("""
vegetable collectible convertible constable spoonful mouthful handful radish rubbish goldfish swordfish jellyfish
catfish shellfish starfish crayfish angelfish clownfish blowfish cuttlefish
""".split())
#: Endings of adjectives; of words that are long enough.
ADJECTIVE_ENDINGS = ("ful", "ous", "less", "ish", "ical", "able", "ible")


class ParsedCaption(NamedTuple):
    """What a caption says."""

    objects: list[str]
    """things, singular, in lower case, in the order of the text"""
    attributes: list[tuple[str, str]]
    """thing and what is said of it"""


class RuleParser:
    """The backend `rules`; see the module."""

    name = "rules"
    #: Part of what a list was made of: another version parses anew.
    version = "rules 2"

    def __call__(self, captions: Sequence[str]) -> list[ParsedCaption | None]:
        """Parse captions; a parser says None where it has no answer, which this one always has."""
        return [parse_by_rules(caption) for caption in captions]


def parse_by_rules(caption: str) -> ParsedCaption:
    """Find the objects of a caption, and their attributes."""
    objects: list[str] = []
    attributes: list[tuple[str, str]] = []
    chain: list[str] = []
    described: list[str] = []
    for word in [*WORD.findall(caption.lower()), "."]:
        word = word.replace("\u2019", "'").removesuffix("'s")
        if not word[0].isalpha() or word in CLOSED or _is_adverb(word):
            _close(chain, described, objects, attributes)
        elif _is_adjective(word) or (_is_participle(word) and not chain):
            # Behind a noun a new phrase begins, or something happens.
            if chain:
                _close(chain, described, objects, attributes)
            described.append(word)
        elif _is_participle(word):
            _close(chain, described, objects, attributes)
        else:
            chain.append(word)
    return ParsedCaption(objects, attributes)


def singular(word: str) -> str:
    """Give a noun's singular."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) < 4 or word in SINGULAR or word.endswith(("ss", "us", "is")) or not word.endswith("s"):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zes")):
        return word[:-2]
    return word[:-1]


def normalised_tag(tag: str, synonyms: dict[str, str]) -> str | None:
    """Bring an object or attribute of any parser to one form; None where it is no tag.

    Args:
        tag: lower case is made here, articles go, the last word becomes singular.
        synonyms: tag -> the one that stands for it.
    """
    words = [word for word in WORD.findall(tag.lower()) if word[0].isalpha()]
    while words and words[0] in ("a", "an", "the"):
        words.pop(0)
    if not words:
        return None
    found = " ".join([*words[:-1], singular(words[-1])])
    found = synonyms.get(found, found)
    return None if found in STOP_TAGS or len(found) < 2 else found


def _close(chain: list[str], described: list[str], objects: list[str], attributes: list[tuple[str, str]]) -> None:
    """End a chain of nouns: its last word is an object, those in front describe it."""
    if chain:
        thing = singular(chain[-1])
        objects.append(thing)
        attributes += ((thing, word) for word in _unique([*described, *chain[:-1]]))
    chain.clear()
    described.clear()


def _unique(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _is_adjective(word: str) -> bool:
    if word in ADJECTIVES:
        return True
    # The plural is no adjective anyway: "vegetables" ends otherwise.
    return len(word) > 5 and word.endswith(ADJECTIVE_ENDINGS) and word not in ADJECTIVE_NOUNS


def _is_adverb(word: str) -> bool:
    return len(word) > 4 and word.endswith("ly") and word not in ("family", "butterfly", "jelly", "dragonfly", "belly")


def _is_participle(word: str) -> bool:
    """Tell a verb's form: a dog sitting, a parked car."""
    nouns = ("building", "wedding", "painting", "ceiling", "clothing", "evening", "morning", "string", "wing", "ring",
             "king", "swing", "earring", "pudding", "dressing", "railing", "duckling", "bed", "seed", "shed", "sled",
             "weed", "reed")  # fmt: skip
    return word not in nouns and len(word) > 4 and word.endswith(("ing", "ed"))
