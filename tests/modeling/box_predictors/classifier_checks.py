"""What tests of several classifiers ask of each: slow gradients, whole detectors, no waiting."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.utils.events import EventStorage
from torch._subclasses.fake_tensor import FakeTensorMode

from bags_d2.modeling import ClassCounts

CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
)
DETECTORS = {"faster": (), "mask": ("MODEL.MASK_ON", True), "cascade": CASCADE}
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


def check_no_rois(loss, num_logits):
    """A batch without RoIs loses nothing, and backward goes through."""
    logits = torch.zeros(0, num_logits, requires_grad=True)
    value = loss(logits)
    value.backward()
    assert value.item() == 0
    assert logits.grad.shape == (0, num_logits)


def check_number_formats(loss, probs, num_rois, num_logits):
    """Half precision and autocast are computed in float32, and huge logits stay finite."""
    exact = random_logits(num_rois, num_logits)
    for dtype in (torch.float16, torch.bfloat16):
        logits = exact.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value, scores = loss(logits), probs(logits)
        value.backward()
        assert value.dtype == scores.dtype == torch.float32
        assert logits.grad.dtype == dtype
        torch.testing.assert_close(value, loss(logits.detach().float()))
        torch.testing.assert_close(scores, probs(logits.detach().float()))
    for sign in (1e4, -1e4):
        logits = (exact.float().sign() * sign).requires_grad_()
        value, scores = loss(logits), probs(logits)
        value.backward()
        assert torch.isfinite(value)
        assert value > 0
        assert torch.isfinite(logits.grad).all()
        assert ((scores >= 0) & (scores <= 1)).all()


def check_never_waits(loss, num_logits):
    """Fake tensors have no values, so a loss that waits for the device to tell one fails.

    Args:
        loss: function of logits (R, C) and labels (R,).
        num_logits: C.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.zeros(7, num_logits, device="cuda", requires_grad=True)
        value = loss(logits, torch.zeros(7, dtype=torch.long, device="cuda"))
    assert value.device.type == "cuda"
    assert value.shape == ()


def check_in_a_detector(cfg, batch, num_stages):
    """A whole detector takes a training step and detects.

    Returns:
        The detector, with the step's gradients.
    """
    torch.manual_seed(0)
    model = build_model(cfg).train()
    with EventStorage() as storage:
        losses = model(batch)
        sum(losses.values()).backward()
        logged = storage.latest()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert sum(name.startswith("loss_cls") for name in losses) == num_stages
    assert ("loss_mask" in losses) == cfg.MODEL.MASK_ON
    assert sum(name.endswith("fast_rcnn/cls_accuracy") for name in logged) == num_stages
    heads = model.roi_heads.box_predictor
    predictors = heads if isinstance(heads, torch.nn.ModuleList) else [heads]
    assert len(predictors) == num_stages
    for predictor in predictors:
        assert type(predictor).__name__ == cfg.MODEL.ROI_BOX_PREDICTOR.NAME
        assert predictor.cls_score.weight.grad.abs().sum() > 0
    for parameter in model.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    with torch.no_grad():
        found = model.eval()(batch[:1])[0]["instances"]
    assert len(found) > 0
    assert ((found.scores > 0) & (found.scores <= 1)).all()
    assert (found.pred_classes < cfg.MODEL.ROI_HEADS.NUM_CLASSES).all()
    return model
