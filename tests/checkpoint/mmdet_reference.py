"""What checkpoints of mmdetection 1.x mean, written down from its definitions, names and all.

Boxes are (x1, y1, x2, y2) of the first and the last pixel, so that x2 - x1 + 1 is a width.
Background is class 0. Nothing here knows of Detectron2.
"""

import numpy as np
import torch
from torch.nn import functional as F

BLOCKS = (3, 4, 6, 3)  # of ResNet-50


def state_dict(num_classes, stem, width, out, fpn, fc, roi=7, masks=0, grouped=0, stages=0, seed=0):
    """Random weights of a Faster, Mask or Cascade R-CNN with ResNet-50-FPN, by their names.

    Args:
        num_classes: classes without background.
        stem, width, out, fpn, fc: channels of the stem, of the first stage's inner and outer
            convolutions, of the FPN and of the box head.
        roi: side of pooled RoIs.
        masks: channels of the mask head; 0 for none.
        grouped: number of bins of a grouped classifier; 0 for a softmax.
        stages: stages of a cascade; 0 for a plain head.
        seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    weights = {}

    def add(name, *shape, bias=True):
        scale = 1 / np.sqrt(np.prod(shape[1:]))
        weights[f"{name}.weight"] = torch.tensor(rng.normal(size=shape) * scale).float()
        if bias:
            rows = shape[1] if "upsample" in name else shape[0]
            weights[f"{name}.bias"] = torch.tensor(rng.normal(size=rows) * 0.1).float()

    def add_norm(name, channels):
        for key, low, high in (
            *(("weight", 0.5, 1.5), ("bias", -0.2, 0.2)),
            *(("running_mean", -0.2, 0.2), ("running_var", 0.5, 1.5)),
        ):
            weights[f"{name}.{key}"] = torch.tensor(rng.uniform(low, high, channels)).float()
        weights[f"{name}.num_batches_tracked"] = torch.tensor(7)

    add("backbone.conv1", stem, 3, 7, 7, bias=False)
    add_norm("backbone.bn1", stem)
    inputs = stem
    for layer, blocks in enumerate(BLOCKS, start=1):
        inner, outer = width * 2 ** (layer - 1), out * 2 ** (layer - 1)
        for block in range(blocks):
            prefix = f"backbone.layer{layer}.{block}"
            shapes = ((inner, inputs, 1, 1), (inner, inner, 3, 3), (outer, inner, 1, 1))
            for i, shape in enumerate(shapes, start=1):
                add(f"{prefix}.conv{i}", *shape, bias=False)
                add_norm(f"{prefix}.bn{i}", shape[0])
            if block == 0:
                add(f"{prefix}.downsample.0", outer, inputs, 1, 1, bias=False)
                add_norm(f"{prefix}.downsample.1", outer)
            inputs = outer
    for i in range(4):
        add(f"neck.lateral_convs.{i}.conv", fpn, out * 2**i, 1, 1)
        add(f"neck.fpn_convs.{i}.conv", fpn, fpn, 3, 3)
    add("rpn_head.rpn_conv", fpn, fpn, 3, 3)
    add("rpn_head.rpn_cls", 3, fpn, 1, 1)
    add("rpn_head.rpn_reg", 12, fpn, 1, 1)
    for stage in [f"{i}." for i in range(stages)] or [""]:
        add(f"bbox_head.{stage}shared_fcs.0", fc, fpn * roi * roi)
        add(f"bbox_head.{stage}shared_fcs.1", fc, fc)
        add(f"bbox_head.{stage}fc_cls", num_classes + 1 + grouped, fc)
        add(f"bbox_head.{stage}fc_reg", 4 if stages else 4 * (num_classes + 1), fc)
    if masks:
        add("mask_head.convs.0.conv", masks, fpn, 3, 3)
        add("mask_head.upsample", masks, masks, 2, 2)
        add("mask_head.conv_logits", num_classes + 1, masks, 1, 1)
    return weights


def intermediate_files(counts, thresholds=(10, 100, 1000)):
    """label2binlabel (bins, 1 + classes) and pred_slice (bins, 2) of training counts."""
    label2binlabel = np.zeros((len(thresholds) + 2, len(counts) + 1), dtype=np.int64)
    label2binlabel[0, 1:] = 1
    sizes = [2] + [1] * (len(thresholds) + 1)
    for label, count in enumerate(counts, start=1):
        bin_ = 1 + sum(count >= t for t in thresholds)
        label2binlabel[bin_, label] = sizes[bin_]
        sizes[bin_] += 1
    starts = np.cumsum([0, *sizes[:-1]])
    return label2binlabel, np.stack([starts, sizes], axis=1)


def fpn_features(weights, image):
    """Maps of the FPN with 4, 8, 16, 32 and 64 pixels a cell; strides in the 3x3 convolutions."""

    def norm(x, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(weights[f"{name}.{key}"] for key in keys), eps=1e-5)

    x = norm(F.conv2d(image, weights["backbone.conv1.weight"], stride=2, padding=3), "backbone.bn1")
    x = F.max_pool2d(F.relu(x), 3, stride=2, padding=1)
    maps = []
    for layer, blocks in enumerate(BLOCKS, start=1):
        for block in range(blocks):
            prefix = f"backbone.layer{layer}.{block}"
            stride = 2 if block == 0 and layer > 1 else 1
            y = x
            for i, (s, p) in enumerate(((1, 0), (stride, 1), (1, 0)), start=1):
                y = F.conv2d(y, weights[f"{prefix}.conv{i}.weight"], stride=s, padding=p)
                y = norm(y, f"{prefix}.bn{i}")
                y = F.relu(y) if i < 3 else y
            if block == 0:
                x = F.conv2d(x, weights[f"{prefix}.downsample.0.weight"], stride=stride)
                x = norm(x, f"{prefix}.downsample.1")
            x = F.relu(x + y)
        maps.append(x)
    lateral = [conv(weights, f"neck.lateral_convs.{i}.conv", m) for i, m in enumerate(maps)]
    for i in (2, 1, 0):
        lateral[i] = lateral[i] + F.interpolate(lateral[i + 1], scale_factor=2, mode="nearest")
    out = [conv(weights, f"neck.fpn_convs.{i}.conv", m, padding=1) for i, m in enumerate(lateral)]
    return [*out, F.max_pool2d(out[-1], 1, stride=2)]


def conv(weights, name, x, padding=0):
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].numpy().T + weights[f"{name}.bias"].numpy()


def box_head(weights, pooled, prefix="bbox_head."):
    """Logits and box deltas of pooled RoIs (R, C, h, w)."""
    x = pooled.reshape(len(pooled), -1)
    for i in range(2):
        x = np.maximum(linear(weights, f"{prefix}shared_fcs.{i}", x), 0)
    return linear(weights, f"{prefix}fc_cls", x), linear(weights, f"{prefix}fc_reg", x)


def mask_logits(weights, pooled):
    """Masks (R, 1 + classes, 2 h, 2 w) of pooled RoIs."""
    x = F.relu(conv(weights, "mask_head.convs.0.conv", pooled, padding=1))
    keys = ("mask_head.upsample.weight", "mask_head.upsample.bias")
    x = F.relu(F.conv_transpose2d(x, *(weights[k] for k in keys), stride=2))
    return conv(weights, "mask_head.conv_logits", x)


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def merged_scores(logits, label2binlabel, pred_slice):
    """Scores (R, 1 + classes) of grouped logits, background first."""
    bins = [softmax(logits[:, start : start + length]) for start, length in pred_slice]
    scores = np.zeros((len(logits), label2binlabel.shape[1]))
    scores[:, 0] = bins[0][:, 0]
    for label in range(1, scores.shape[1]):
        for i in range(1, len(bins)):
            slot = label2binlabel[i, label]
            if slot > 0:  # 0 is "others"
                scores[:, label] = bins[0][:, 1] * bins[i][:, slot]
    return scores


def decode(rois, deltas, stds):
    """Boxes (R, 4) that deltas (R, 4) make of RoIs (R, 4), not yet clipped."""
    dx, dy, dw, dh = (deltas * np.asarray(stds)).T
    limit = abs(np.log(16 / 1000))
    dw, dh = np.clip(dw, -limit, limit), np.clip(dh, -limit, limit)
    width, height = rois[:, 2] - rois[:, 0] + 1, rois[:, 3] - rois[:, 1] + 1
    x = (rois[:, 0] + rois[:, 2]) * 0.5 + width * dx
    y = (rois[:, 1] + rois[:, 3]) * 0.5 + height * dy
    w, h = width * np.exp(dw), height * np.exp(dh)
    return np.stack(
        [x - w * 0.5 + 0.5, y - h * 0.5 + 0.5, x + w * 0.5 - 0.5, y + h * 0.5 - 0.5], axis=1
    )


def base_anchors(stride, scale=8, ratios=(0.5, 1.0, 2.0)):
    """Anchors (3, 4) of the first cell, rounded to whole pixels."""
    center = 0.5 * (stride - 1)
    heights = np.sqrt(ratios) * stride * scale
    widths = stride * scale / np.sqrt(ratios)
    low = np.stack([center - 0.5 * (widths - 1), center - 0.5 * (heights - 1)], axis=1)
    high = np.stack([center + 0.5 * (widths - 1), center + 0.5 * (heights - 1)], axis=1)
    return np.round(np.hstack([low, high]))
