"""Every configuration key that this package adds to Detectron2's."""

from detectron2.config import CfgNode

__all__ = ["add_bags_config"]


def add_bags_config(cfg: CfgNode) -> None:
    """Add the keys of this package to a Detectron2 config, in place.

    The defaults leave every stock model as it is: nothing changes before a YAML selects
    ``MODEL.ROI_HEADS.NAME: LongTailROIHeads`` or ``LongTailCascadeROIHeads``.

    Args:
        cfg: a config made by ``detectron2.config.get_cfg()``.
    """
    # The classifier of the RoI heads, from ROI_BOX_PREDICTOR_REGISTRY. "FastRCNNOutputLayers" is
    # Detectron2's own (softmax, or sigmoid by MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE).
    cfg.MODEL.ROI_BOX_PREDICTOR = CfgNode()
    cfg.MODEL.ROI_BOX_PREDICTOR.NAME = "BAGSOutputLayers"

    cfg.MODEL.BAGS = CfgNode()
    # Edges of the half-open bins of training count that make the foreground groups: (10, 100,
    # 1000) is [0, 10) [10, 100) [100, 1000) [1000, inf). Strictly increasing; () is one group.
    cfg.MODEL.BAGS.GROUP_THRESHOLDS = (10, 100, 1000)
    # beta: "others" RoIs drawn for each foreground RoI of a group. .inf uses all, 0.0 none.
    cfg.MODEL.BAGS.OTHERS_SAMPLE_RATIO = 8.0
    # What is counted for a class: its "instances" (annotations; the paper) or its "images".
    cfg.MODEL.BAGS.COUNT_BY = "instances"
    # JSON with the training count of each class: a list in contiguous class order, or an object
    # {class name: count}. "" counts the data sets of DATASETS.TRAIN.
    cfg.MODEL.BAGS.CLASS_COUNTS_FILE = ""
    # What a cascade averages over its stages: raw "logits" (the authors) or "probs" (Detectron2).
    cfg.MODEL.BAGS.CASCADE_AVERAGE = "logits"

    # Names of the parameters to train, as globs against model.named_parameters(); all others are
    # frozen, and BatchNorm layers without a trainable parameter keep their statistics. Every glob
    # must match something. () trains everything that the model itself leaves trainable.
    cfg.MODEL.TRAINABLE_PARAMS = ()
