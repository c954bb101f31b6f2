"""Registry of the classifiers ("box predictors") of the RoI heads."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from fvcore.common.registry import Registry
from torch import nn

from ...errors import ConfigError

__all__ = ["ROI_BOX_PREDICTOR_REGISTRY", "build_box_predictor"]

ROI_BOX_PREDICTOR_REGISTRY = Registry("ROI_BOX_PREDICTOR")
ROI_BOX_PREDICTOR_REGISTRY.__doc__ = """
Registry for box predictors: modules with the interface of Detectron2's FastRCNNOutputLayers,
called as ``predictor(cfg, input_shape, **kwargs)``.
"""


def build_box_predictor(cfg: CfgNode, input_shape: ShapeSpec, **kwargs) -> nn.Module:
    """Build the box predictor named by ``MODEL.ROI_BOX_PREDICTOR.NAME`` (else ConfigError).

    ``kwargs`` replace what ``from_config`` gives, such as ``box2box_transform`` of a cascade stage.
    """
    name = cfg.MODEL.ROI_BOX_PREDICTOR.NAME
    if name not in ROI_BOX_PREDICTOR_REGISTRY:
        known = ", ".join(sorted(key for key, _ in ROI_BOX_PREDICTOR_REGISTRY))
        raise ConfigError(
            f"MODEL.ROI_BOX_PREDICTOR.NAME is '{name}', which is not registered; choose one of: "
            f"{known}"
        )
    return ROI_BOX_PREDICTOR_REGISTRY.get(name)(cfg, input_shape, **kwargs)
