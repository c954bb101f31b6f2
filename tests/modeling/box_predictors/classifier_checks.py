"""What tests of several classifiers share: predictors, slow gradients, no waiting."""

import contextlib
import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch._subclasses.fake_tensor import FakeTensorMode

from bags_d2.modeling import ClassCounts

CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
)
MASK = ("MODEL.MASK_ON", True)
DETECTORS = {"mask": MASK, "cascade": CASCADE, "cascade_mask": (*CASCADE, *MASK)}
FEATURES = 16


def long(labels):
    return torch.tensor(labels, dtype=torch.long)


def random_logits(num_rois, num_logits, scale=2.0):
    """Logits (R, C) in float64."""
    generator = torch.Generator().manual_seed(num_rois)
    return scale * torch.randn(num_rois, num_logits, generator=generator, dtype=torch.float64)


def make_predictor(cls, counts=None, **kwargs):
    """A predictor of some features with weights that tell classes apart."""
    if counts is not None:
        kwargs.update(counts=ClassCounts.from_counts(counts), num_classes=len(counts))
    torch.manual_seed(0)
    transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    predictor = cls(ShapeSpec(channels=FEATURES), box2box_transform=transform, **kwargs)
    torch.nn.init.normal_(predictor.cls_score.weight)
    torch.nn.init.normal_(predictor.cls_score.bias)
    return predictor


def slow_cross_entropy(row, label):
    """Cross-entropy of one RoI in plain Python."""
    top = max(row)
    return top + math.log(sum(math.exp(z - top) for z in row)) - row[label]


def check_loss_and_gradient(loss, slow_loss, logits):
    """Compare value and gradient of a loss with those of a slow function of lists.

    Args:
        loss: function of logits (R, C).
        slow_loss: function of R lists of C floats; its gradient is taken by differences.
        logits: (R, C), float64.
    """
    logits = logits.clone().requires_grad_()
    value = loss(logits)
    value.backward()
    rows = logits.tolist()
    gradient = torch.zeros_like(logits)
    for r, row in enumerate(rows):
        for c, z in enumerate(row):
            ends = []
            for step in (1e-5, -1e-5):
                row[c] = z + step
                ends.append(slow_loss(rows))
            row[c] = z
            gradient[r, c] = (ends[0] - ends[1]) / 2e-5
    assert value.item() == pytest.approx(slow_loss(rows), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-5, atol=1e-6)


def make_proposals(labels):
    """Proposals of one image, in a list, with ground truth near them."""
    generator = torch.Generator().manual_seed(1)
    corners = 20 * torch.rand(len(labels), 4, generator=generator)
    corners[:, 2:] += corners[:, :2] + 5
    proposals = Instances((64, 64), proposal_boxes=Boxes(corners), gt_classes=long(labels))
    proposals.gt_boxes = Boxes(corners + 2 * torch.rand(len(labels), 4, generator=generator))
    return [proposals]


@contextlib.contextmanager
def never_waits():
    """Fake tensors on a fake device have no values, so what waits for one fails."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
