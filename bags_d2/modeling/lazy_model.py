"""The model of a LazyConfig, as a meta-architecture that Detectron2's ``build_model`` finds."""

from detectron2.config import CfgNode, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from ..config.lazy_reader import changes_predictor, lazy_config
from ..errors import ConfigError
from .box_predictors import build_box_predictor

__all__ = ["LazyModel"]

# What a new classifier takes over from the one in its place.
_KEPT = ("box2box_transform", "smooth_l1_beta", "box_reg_loss_type", "loss_weight")
_KEPT += ("test_score_thresh", "test_nms_thresh", "test_topk_per_image")


@META_ARCH_REGISTRY.register()
def LazyModel(cfg: CfgNode) -> nn.Module:
    """The model of the LazyConfig that a config was read from, on the CPU.

    Where a method has changed the classifier's keys, it is built from them as that of a YAML is.

    Raises:
        ConfigError: if the config is of a YAML, or a package is missing that the model needs.
    """
    lazy = lazy_config(cfg)
    if lazy is None:
        raise ConfigError(
            "MODEL.META_ARCHITECTURE 'LazyModel' is that of a LazyConfig; name its .py as the "
            "config instead of a YAML."
        )
    try:
        model = instantiate(lazy.model)
    except ModuleNotFoundError as error:
        raise ConfigError(f"The model needs '{error.name}': pip install {error.name}.") from None
    if changes_predictor(cfg):
        heads = model.roi_heads
        if isinstance(heads.box_predictor, nn.ModuleList):
            heads.box_predictor = nn.ModuleList(_rebuilt(cfg, p) for p in heads.box_predictor)
        else:
            heads.box_predictor = _rebuilt(cfg, heads.box_predictor)
    return model


def _rebuilt(cfg: CfgNode, old: nn.Module) -> nn.Module:
    kept = {name: getattr(old, name) for name in _KEPT}
    if cfg.MODEL.ROI_BOX_PREDICTOR.NAME != "FastRCNNOutputLayers":
        kept |= {"use_sigmoid_ce": False, "use_fed_loss": False}  # were the replaced classifier's
    is_agnostic = old.bbox_pred.out_features == 4
    shape = ShapeSpec(channels=old.cls_score.in_features)
    return build_box_predictor(cfg, shape, cls_agnostic_bbox_reg=is_agnostic, **kept)
