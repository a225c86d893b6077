"""Import of torchvision next to a CPU build of torch."""

import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)

#: The library object must live as long as the process: torch drops its operators with it.
_libraries: list[Any] = []


def ensure_torchvision() -> None:
    """Import torchvision, declaring the operators that its compiled part fails to register; call before importing timm.

    The torchvision wheel of the package index is built for CUDA. Next to a CPU torch its library can't load, and the
    import dies with "operator torchvision::nms does not exist". Declared without an implementation the operators let
    transforms and models work; `nms` itself then raises when it is called.
    """
    try:
        import torchvision  # noqa: F401

        return
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    import torch  # here: recipes import this module, and --help needs none

    for name in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # what a failed import leaves behind would fail again
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    import torchvision  # noqa: F401

    logger.info("torchvision %s has no compiled operators for this torch; nms is unavailable", torchvision.__version__)
