"""Conversion of a checkpoint of the BAGS authors to one of a config's model."""

import os
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ..data.class_statistics import ClassStatistics, training_class_counts
from ..errors import DataError, MissingFileError
from ..utils.files import write_atomically
from .checkpointer import LongTailCheckpointer
from .files import read_tensor, read_torch
from .mmdet import GroupLayout, convert_state_dict

__all__ = ["convert_checkpoint"]


def convert_checkpoint(
    source: Path,
    target: Path,
    cfg: CfgNode,
    label2binlabel: Path | None = None,
    pred_slice: Path | None = None,
) -> tuple[int, int]:
    """Convert a file, and load the result into the model of the config before it gets its name.

    Args:
        source: the authors' ``.pth``.
        target: the file to write.
        cfg: config of the same model.
        label2binlabel, pred_slice: the authors' files of class groups; None takes the training
            counts.

    Returns:
        How many tensors were converted and left out.

    Raises:
        MissingFileError: if the class groups are unknown.
        DataError, ConfigError: if the files contradict each other or the config.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    checkpoint = read_torch(source)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise DataError(f"'{source}' has no 'state_dict': not a checkpoint of mmdetection.")
    is_grouped = cfg.MODEL.ROI_BOX_PREDICTOR.NAME == "BAGSOutputLayers"
    layout = _group_layout(cfg, label2binlabel, pred_slice) if is_grouped else None
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    weights, left_out = convert_state_dict(checkpoint["state_dict"], num_classes, layout)
    partial = target.with_name(f".{target.name}.{os.getpid()}.pth")
    classes = ClassStatistics.from_training_set(cfg).for_checkpoint()
    with write_atomically(partial, "wb") as file:
        torch.save({"model": weights, **classes, "__author__": "BAGS, converted"}, file)
    try:
        # Whatever does not fit the model of the config is an error here, not at evaluation.
        LongTailCheckpointer(build_model(cfg), evaluating=True).load(str(partial))
    except BaseException:
        partial.unlink()
        raise
    partial.replace(target)
    return len(weights), len(left_out)


def _group_layout(
    cfg: CfgNode, label2binlabel: Path | None, pred_slice: Path | None
) -> GroupLayout:
    """From the authors' files, checked with the training counts where both are there."""
    thresholds = tuple(cfg.MODEL.BAGS.GROUP_THRESHOLDS)
    try:
        counts, reason = training_class_counts(cfg, by="instances"), ""
    except FileNotFoundError as error:
        counts, reason = None, str(error)
    if label2binlabel and pred_slice:
        files = read_tensor(label2binlabel), read_tensor(pred_slice)
        return GroupLayout.from_files(*files, thresholds, counts)
    if counts is None:
        raise MissingFileError(
            "The class groups are unknown: give the authors' --label2binlabel and --pred-slice, or "
            f"the training counts ({reason})"
        )
    return GroupLayout.from_counts(counts, thresholds)
