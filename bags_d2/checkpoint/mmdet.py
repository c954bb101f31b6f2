"""Checkpoints of the BAGS authors' code (mmdetection 1.x) in this package's terms.

Names, the place of the background class and the order of grouped logits differ. What no renaming
can carry over (colour order, RoIAlign, anchors, ...) is in ``configs/mmdet/Base-mmdet.yaml``.

Shapes: K foreground classes, G foreground groups, C = K + G + 2 logits.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ..data.class_statistics import ClassStatistics, training_class_counts
from ..errors import DataError, MissingFileError
from ..modeling.class_groups import ClassGroups
from ..utils.files import write_atomically
from .checkpointer import LongTailCheckpointer
from .files import read_tensor, read_torch

_BLOCK = r"backbone\.layer(\d)\.(\d+)\."
_HEAD = r"bbox_head\.((?:\d\.)?)"  # with the stage of a cascade
# Patterns of whole names, and what they become; "\1+2" adds 2 to the number in the first bracket.
_RENAMES = {
    r"backbone\.conv1\.(\w+)": r"backbone.bottom_up.stem.conv1.\1",
    r"backbone\.bn1\.(\w+)": r"backbone.bottom_up.stem.conv1.norm.\1",
    _BLOCK + r"conv(\d)\.(\w+)": r"backbone.bottom_up.res\1+1.\2.conv\3.\4",
    _BLOCK + r"bn(\d)\.(\w+)": r"backbone.bottom_up.res\1+1.\2.conv\3.norm.\4",
    _BLOCK + r"downsample\.0\.(\w+)": r"backbone.bottom_up.res\1+1.\2.shortcut.\3",
    _BLOCK + r"downsample\.1\.(\w+)": r"backbone.bottom_up.res\1+1.\2.shortcut.norm.\3",
    r"neck\.lateral_convs\.(\d)\.conv\.(\w+)": r"backbone.fpn_lateral\1+2.\2",
    r"neck\.fpn_convs\.(\d)\.conv\.(\w+)": r"backbone.fpn_output\1+2.\2",
    r"rpn_head\.rpn_conv\.(\w+)": r"proposal_generator.rpn_head.conv.\1",
    r"rpn_head\.rpn_cls\.(\w+)": r"proposal_generator.rpn_head.objectness_logits.\1",
    r"rpn_head\.rpn_reg\.(\w+)": r"proposal_generator.rpn_head.anchor_deltas.\1",
    _HEAD + r"shared_fcs\.(\d)\.(\w+)": r"roi_heads.box_head.\1fc\2+1.\3",
    _HEAD + r"fc_cls\.(\w+)": r"roi_heads.box_predictor.\1cls_score.\2",
    _HEAD + r"fc_reg\.(\w+)": r"roi_heads.box_predictor.\1bbox_pred.\2",
    r"mask_head\.convs\.(\d)\.conv\.(\w+)": r"roi_heads.mask_head.mask_fcn\1+1.\2",
    r"mask_head\.upsample\.(\w+)": r"roi_heads.mask_head.deconv.\1",
    r"mask_head\.conv_logits\.(\w+)": r"roi_heads.mask_head.predictor.\1",
}


@dataclass(frozen=True)
class GroupLayout:
    """Order of the authors' grouped logits, and the class groups that it is of.

    Attributes:
        groups: the class groups in this package's order.
        columns: long tensor (C,), for each of this package's logits the place of the authors'.
    """

    groups: ClassGroups
    columns: torch.Tensor

    @classmethod
    def from_files(
        cls,
        label2binlabel: torch.Tensor,
        pred_slice: torch.Tensor,
        thresholds: tuple[int, ...],
        class_counts: torch.Tensor | None = None,
    ) -> "GroupLayout":
        """The layout that the authors' intermediate files describe.

        Args:
            label2binlabel: (G + 1, K + 1), for each bin the label in it of each class, background
                first; 0 is "others" and, in the first bin, background.
            pred_slice: (G + 1, 2), first logit and number of logits of each bin.
            thresholds: edges of the groups.
            class_counts: K training instances; None if unknown.

        Raises:
            DataError: if the files contradict each other, the thresholds or the counts.
        """
        bins = label2binlabel.shape[0] if label2binlabel.dim() == 2 else 0
        if bins != len(thresholds) + 2 or pred_slice.shape != (bins, 2):
            raise DataError(
                f"label2binlabel {tuple(label2binlabel.shape)} and pred_slice "
                f"{tuple(pred_slice.shape)} are not of {len(thresholds) + 1} groups and a bin "
                "before them (MODEL.BAGS.GROUP_THRESHOLDS)."
            )
        slots = label2binlabel[1:, 1:].long()  # (G, K)
        in_one_bin = ((slots > 0).sum(dim=0) == 1).all() and (label2binlabel[0, 1:] == 1).all()
        if not in_one_bin or label2binlabel[:, 0].any():
            raise DataError(
                "label2binlabel must put every class into one bin, after a first of two."
            )
        class_to_group = slots.argmax(dim=0) + 1
        if class_counts is None:
            class_counts = torch.full_like(class_to_group, -1)
        else:
            _check_counts(class_to_group, class_counts, thresholds)
        groups = ClassGroups(class_to_group, class_counts, thresholds)
        starts, lengths = pred_slice.long().unbind(dim=1)
        if lengths.tolist() != list(groups.widths):
            raise DataError(
                f"pred_slice has bins of {lengths.tolist()} logits, label2binlabel of "
                f"{list(groups.widths)}."
            )
        columns = torch.full((groups.num_logits,), -1)
        columns[0], columns[1] = starts[0], starts[0] + 1
        for group, columns_of_group in enumerate(groups.group_slices[1:]):
            columns[columns_of_group.start] = starts[group + 1]
        of_class = slots.gather(0, (class_to_group - 1)[None])[0]
        columns[groups.class_to_column] = starts[class_to_group] + of_class
        if sorted(columns.tolist()) != list(range(groups.num_logits)):
            raise DataError("pred_slice and label2binlabel do not share out all logits.")
        return cls(groups, columns)

    @classmethod
    def from_counts(cls, class_counts: torch.Tensor, thresholds: tuple[int, ...]) -> "GroupLayout":
        """The layout that the authors' scripts make of training counts, which is this package's."""
        groups = ClassGroups.from_counts(class_counts, thresholds)
        return cls(groups, torch.arange(groups.num_logits))


def convert_state_dict(
    weights: Mapping[str, torch.Tensor], num_classes: int, layout: GroupLayout | None = None
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Rename and reorder the weights of a checkpoint of the authors.

    Args:
        weights: their ``state_dict``, of Faster, Mask or Cascade R-CNN with ResNet or ResNeXt.
        num_classes: K.
        layout: order of the grouped logits; None for a softmax baseline.

    Returns:
        The weights, with the class groups of each box predictor, and the names that were left
        out: counters of BatchNorm, which do nothing in a detector whose statistics are frozen.

    Raises:
        DataError: if a name is not known, or a classifier has another width.
    """
    converted, left_out = {}, []
    for name, tensor in weights.items():
        name = name.removeprefix("module.")
        if name.endswith("num_batches_tracked"):
            left_out.append(name)
            continue
        target = _rename(name)
        converted[target] = _reorder(target, torch.as_tensor(tensor), num_classes, layout)
    if layout is not None:
        for name in [n for n in converted if n.endswith("cls_score.weight")]:
            prefix = name.removesuffix("cls_score.weight")
            for key, value in layout.groups.state_dict().items():
                converted[f"{prefix}groups.{key}"] = value.clone()
    return converted, left_out


def _rename(name: str) -> str:
    for pattern, template in _RENAMES.items():
        if match := re.fullmatch(pattern, name):

            def fill(place: re.Match, match: re.Match = match) -> str:
                found = match[int(place[1])]
                return str(int(found) + int(place[2])) if place[2] else found

            return re.sub(r"\\(\d)(?:\+(\d))?", fill, template)
    raise DataError(
        f"'{name}' is no part of a Faster, Mask or Cascade R-CNN of mmdetection 1.x; hybrid task "
        "cascades, cascades with masks and deformable convolution cannot be converted."
    )


def _reorder(
    name: str, tensor: torch.Tensor, num_classes: int, layout: GroupLayout | None
) -> torch.Tensor:
    """Rows of classifiers, class-specific boxes and masks in this package's order."""
    if ".cls_score." in name:
        expected = num_classes + 1 if layout is None else layout.groups.num_logits
        if len(tensor) != expected:
            raise DataError(
                f"The classifier has {len(tensor)} logits where {expected} were expected; is the "
                "config (BAGS or baseline, MODEL.ROI_HEADS.NUM_CLASSES) that of the checkpoint?"
            )
        if layout is not None:
            return tensor[layout.columns]
        return torch.cat([tensor[1:], tensor[:1]])  # background goes last
    # Rows of each class; background's come first, and are never used.
    rows = 4 if ".bbox_pred." in name and len(tensor) != 4 else 0
    rows = 1 if ".mask_head.predictor." in name else rows
    if rows and len(tensor) != rows * (num_classes + 1):
        expected = rows * (num_classes + 1)
        raise DataError(f"'{name}' has {len(tensor)} rows where {expected} were expected.")
    return tensor[rows:]


def _check_counts(class_to_group: torch.Tensor, class_counts: torch.Tensor, thresholds) -> None:
    if len(class_counts) != len(class_to_group):
        raise DataError(
            f"label2binlabel is of {len(class_to_group)} classes, the training counts of "
            f"{len(class_counts)}."
        )
    expected = ClassGroups.from_counts(class_counts, thresholds).class_to_group
    if differ := int((expected != class_to_group).sum()):
        raise DataError(
            f"label2binlabel groups {differ} classes differently from the training counts; are "
            "they of the same data set?"
        )


def convert_checkpoint(
    source: Path,
    target: Path,
    cfg: CfgNode,
    label2binlabel: Path | None = None,
    pred_slice: Path | None = None,
) -> tuple[int, int]:
    """Convert a file, and load the result into the model of the config before it gets its name.

    Args:
        source, target: the authors' ``.pth``, and the file to write.
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
