"""Names and numbers of the categories: COCO's 80, or those of a file."""

from dataclasses import dataclass
from pathlib import Path

from finetune.classification.labels import read_names
from finetune.recipe import TuneRecipe
from pretrain.errors import DataError
from pretrain.runtime import storage
from pretrain.runtime.untrusted import parse_json

#: Categories beside exported weights.
CATEGORIES = "categories.json"
#: Ids between 1 and 90 that COCO's published annotations of objects don't use.
GAPS = frozenset((12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)


@dataclass(frozen=True)
class Category:
    """One class: its number in annotation files, and its name."""

    id: int
    name: str


def coco_categories() -> list[Category]:
    """Give COCO's 80 categories, by rising id."""
    ids = [number for number in range(1, 91) if number not in GAPS]
    return [Category(number, name) for number, name in zip(ids, COCO_NAMES.split(","), strict=True)]


def categories_of(recipe: TuneRecipe, source: Path | None = None) -> list[Category]:
    """Find the classes: from beside exported weights, else of the file that the first source names in `labels`, else
    COCO's.

    Raises:
        DataError: the file is none, or has another number of classes than model.classes.
    """
    stated = next((one.labels for one in recipe.data.sources.values() if one.labels not in ("auto", "integer")), None)
    beside = source / CATEGORIES if source is not None else None
    path = str(beside) if beside is not None and beside.is_file() else stated
    found, where = (coco_categories(), "COCO") if path is None else (read_categories(path), path)
    classes = recipe.model.classes
    if len(found) != classes:
        raise DataError(
            f"{where}: {len(found)} categories, model.classes={classes}; data.sources.<name>.labels names a file of as "
            "many, COCO's json or names, one a line"
        )
    return found


def read_categories(path: str) -> list[Category]:
    """Read categories by rising id, of COCO's json; or names, one a line, which are counted from 1.

    Raises:
        DataError: it is none of them, or a name stands there twice.
    """
    if not path.endswith(".json"):
        found = [Category(number, name) for number, name in enumerate(read_names(path), 1)]
    else:
        try:
            content = parse_json(storage.read_bytes(path))
            found = [Category(int(one["id"]), str(one["name"])) for one in content["categories"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: not COCO's json, categories: [{{id, name}}] ({type(error).__name__}: {error})"
            ) from error
    if len({one.name for one in found}) != len(found) or len({one.id for one in found}) != len(found):
        raise DataError(f"{path}: a category's name or id stands there twice; allowed: one each")
    return sorted(found, key=lambda one: one.id)
