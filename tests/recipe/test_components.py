"""Files of a user's own with a mistake in them: one error that names the file and what it lacks, whatever is wrong."""

from pathlib import Path

import pytest

import pretrain.models
import pretrain.objectives
import pretrain.samples
from pretrain.errors import RecipeError
from pretrain.objectives.base import method_of
from pretrain.recipe.load import load_recipe

METHOD = """
from pretrain.objectives import videomae

class Config(videomae.Config): ...

"""
#: File -> what is told of it.
FILES = {
    "no_method": (
        "from pretrain.objectives.videomae import Config\n",
        r"no_method has no `METHOD`",
    ),
    "no_config": ("from pretrain.objectives.videomae import METHOD\n", "no_config has no `Config`, a dataclass"),
    "an_instance": (METHOD + "METHOD = Config()\n", "an_instance has no `METHOD`, the class"),
    "another_class": (
        METHOD + "METHOD = Config\n",
        r"METHOD is Config, allowed: a subclass of .*base.Method",
    ),
    "incomplete": (
        METHOD + "from pretrain.objectives.base import Method\nclass METHOD(Method): ...\n",
        "METHOD does not define build, cost, samples",
    ),
    "misspelt": ("def f(:\n", r"misspelt.py:1: invalid syntax"),
    "not_installed": (
        "import nothing_of_that_name\n",
        r"not_installed.py:1: ModuleNotFoundError: .*nothing_of",
    ),
    "raising": ("1 / 0\n", r"raising.py:1: ZeroDivisionError: division by zero"),
    "named_kind": (
        METHOD + "class METHOD(videomae.VideoMAEMethod):\n    MODEL = 'classifier'\n",
        "METHOD.MODEL is 'classifier', allowed: a kind of model",
    ),
}
MODEL = """
from pretrain.models import image_vit
from pretrain.models.base import Architecture, Classifier

class Config(image_vit.Config): ...

"""
#: The same for models.
MODEL_FILES = {
    "no_architecture": ("from pretrain.models.image_vit import Config\n", "no_architecture has no `ARCHITECTURE`"),
    "its_instance": (MODEL + "ARCHITECTURE = Config()\n", "its_instance has no `ARCHITECTURE`, the class"),
    "another_model_class": (
        MODEL + "ARCHITECTURE = Config\n",
        r"ARCHITECTURE is Config, allowed: a subclass of pretrain.models.base.Architecture",
    ),
    "its_module": (
        MODEL + "ARCHITECTURE = image_vit.ImageViT\n",
        r"ARCHITECTURE is ImageViT, allowed: a subclass of pretrain.models.base.Architecture",
    ),
    "incomplete_model": (
        MODEL + "class ARCHITECTURE(Classifier):\n    def problems(self):\n        return []\n",
        "ARCHITECTURE does not define build, cost, layer_of",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_mistake_in_a_method_is_one_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, told = FILES[name]
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(pretrain.objectives, "__path__", [*pretrain.objectives.__path__, str(tmp_path)])
    with pytest.raises(RecipeError, match=told):
        method_of(load_recipe("vit_s_v1_k400", [f"objective.name={name}"]))


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_mistake_in_a_model_is_one_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, told = MODEL_FILES[name]
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(pretrain.models, "__path__", [*pretrain.models.__path__, str(tmp_path)])
    with pytest.raises(RecipeError, match=told):
        method_of(load_recipe("vit_s_v1_k400", [f"model.name={name}"]))


def test_a_kind_of_sample_whose_config_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_input.py").write_text("class Config: ...\n")
    monkeypatch.setattr(pretrain.samples, "__path__", [*pretrain.samples.__path__, str(tmp_path)])
    with pytest.raises(RecipeError, match="no_input has no `Config`, a dataclass of its own that inherits"):
        load_recipe("vit_s_v1_k400", ["input.name=no_input"])
