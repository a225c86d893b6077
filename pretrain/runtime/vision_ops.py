"""Import of torchvision next to a torch that its compiled operators are not for, and what stands in for them."""

import functools
import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)

#: The library object must live as long as the process: torch drops its operators with it.
_libraries: list[Any] = []
_NMS = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_ROI_ALIGN = (
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor"
)
#: torchvision's modules that ask for its compiled part before they call one of the operators that have a stand-in.
_CALLERS = ("torchvision.ops.boxes", "torchvision.ops.roi_align")


@functools.cache
def ensure_torchvision() -> None:
    """Import torchvision, with operators of our own where its compiled part doesn't load; call before importing timm.

    The torchvision wheel of the package index is built for CUDA. Next to a CPU torch its library can't load, and the
    import dies with "operator torchvision::nms does not exist". Then `nms` and `roi_align`, with a gradient, are ours
    (box_operators.py); all others say that they are not compiled, and `qnms` raises when it is called. Where the
    compiled part loads, nothing is changed.
    """
    try:
        import torchvision  # noqa: F401

        return
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # what a failed import leaves behind would fail again
    _define_operators()
    import torchvision

    for name in _CALLERS:
        # They would refuse, or (roi_align) compile a version that reads four pixels a sample, which takes gigabytes.
        module: Any = sys.modules[name]
        module._assert_has_ops, module._has_ops = _nothing_missing, _there
    logger.info("torchvision %s has no compiled operators for this torch; nms and roi_align are of tensors",
                torchvision.__version__)  # fmt: skip


def has_compiled_operators() -> bool:
    """Tell whether torchvision's compiled operators are there for this build of torch."""
    ensure_torchvision()
    return not _libraries


def _define_operators() -> None:
    import torch  # here: recipes import this module, and --help needs none

    from pretrain.runtime.box_operators import roi_align_by_tensors, suppress_by_tensors

    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(_NMS.format(operator))
    library.define(_ROI_ALIGN)

    def roi_align(maps: Any, rois: Any, scale: float, rows: int, columns: int, samples: int, aligned: bool) -> Any:
        images = rois[:, 0].to(torch.int64)
        return roi_align_by_tensors(maps, rois[:, 1:], images, (rows, columns), scale, max(samples, 0), aligned)

    # Not composite: torchvision brings a kernel of shapes for nms, which torch takes for an operator of devices alone.
    for device in ("CPU", "CUDA"):
        library.impl("nms", suppress_by_tensors, device)
    # Composite, so that its gradient is that of its parts.
    library.impl("roi_align", roi_align, "CompositeImplicitAutograd")
    _libraries.append(library)


def _there() -> bool:
    return True


def _nothing_missing() -> None:
    return None
