"""Exact top-k detection for thousands of classes.

Detectron2 decodes a box for every (RoI, class), thresholds the scores and runs NMS on all that is
left: up to a million candidates, of which 300 are kept. But NMS drops a candidate only in favour
of a *better-scored* one of its class. So the m best candidates decide among themselves which of
them survive, and if k or more do, the first k of these are the detections. Here m starts at a few
times k and doubles while fewer survive; only the candidates looked at are ever decoded.

Shapes in this file: R RoIs of one image, K foreground classes, B = K boxes for a RoI or B = 1 if
all classes share one, n candidates. A candidate is a (RoI, class) whose score exceeds the
threshold; candidates are ordered by falling score, ties by RoI and class.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torchvision.ops import nms

# Candidates looked at first, for each detection wanted. Several proposals see an object, and each
# in several classes, so of a trained detector's best candidates perhaps one in five survives.
CANDIDATES_PER_DETECTION = 8

# Scores over which maxima are taken to bound the m-th best score.
BLOCK = 16

# Up to this many candidates one call of nms() is faster than one for each class. Above, on any
# device, torchvision's batched_nms goes class by class, and moves no boxes apart to separate the
# classes, which in float32 would change their IoUs.
SINGLE_NMS_LIMIT = 5_000

# Candidates that a trace looks at, whose number cannot grow with the input's needs.
TRACED_CANDIDATES = 10_000


@dataclass(frozen=True)
class BoxDeltas:
    """The boxes of one image, each decoded when it is asked for.

    Attributes:
        deltas: (R, 4 * B), what the box predictor regressed.
        proposals: (R, 4), XYXY in pixels.
        transform: decodes ``deltas`` relative to ``proposals``.
    """

    deltas: torch.Tensor
    proposals: torch.Tensor
    transform: Box2BoxTransform

    def decode(self) -> torch.Tensor:
        """All boxes (R, 4 * B), not clipped."""
        return self.transform.apply_deltas(self.deltas, self.proposals)

    def decode_at(self, rois: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The boxes (n, 4), not clipped, at indices (n,) into the RoIs and into the B boxes."""
        deltas = self.deltas.unflatten(1, (-1, 4))[rois, columns]
        return self.transform.apply_deltas(deltas, self.proposals[rois])

    def surely_finite(self) -> torch.Tensor:
        """Bool scalar: if True, every box decodes to finite numbers; False leaves that open."""
        scale = math.exp(min(self.transform.scale_clamp, 700.0))
        reach = 1 + _norm(self.deltas) / min(self.transform.weights) + scale
        return _norm(self.proposals) * reach < 1e30


def fast_rcnn_inference_topk(
    boxes: Sequence[torch.Tensor | BoxDeltas],
    scores: Sequence[torch.Tensor],
    image_shapes: Sequence[tuple[int, int]],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
) -> tuple[list[Instances], list[torch.Tensor]]:
    """Detectron2's ``fast_rcnn_inference`` for less work.

    The detections are the same but where an IoU is within 1e-5 of ``nms_thresh``, which rounding
    may put on either side, or where scores tie, which Detectron2 leaves in any order.

    Args:
        boxes: for each image (Ri, 4 * B), XYXY in pixels and not clipped, or :class:`BoxDeltas`
            of that shape.
        scores: for each image (Ri, K + 1) of any floating dtype; the last column is background.
        image_shapes: (height, width) of each image in pixels.
        score_thresh: candidates must score more than this.
        nms_thresh: IoU, 0 to 1, above which a candidate gives way to a better one of its class.
        topk_per_image: the number of detections to keep; all of them if negative.

    Returns:
        For each image the detections, best first, with ``pred_boxes`` (clipped), ``scores`` and
        ``pred_classes``; and for each image their RoIs, a long tensor. RoIs with a score or box
        that is not finite are left out, and the others are then counted without them, as in
        Detectron2. While tracing (also for ONNX) nothing may depend on the data: only the
        ``TRACED_CANDIDATES`` best candidates are looked at, and no RoI is left out.
    """
    detect = _detect_traceably if torch.jit.is_tracing() else _detect
    results = [
        detect(*image, score_thresh, nms_thresh, topk_per_image)
        for image in zip(boxes, scores, image_shapes, strict=True)
    ]
    return [instances for instances, _ in results], [rois for _, rois in results]


def _detect(boxes, scores, image_shape, score_thresh, nms_thresh, topk):
    """Detections of one image and their RoIs."""
    boxes, scores = _drop_non_finite(boxes, scores)
    scores = scores[:, :-1].contiguous()  # (R, K)
    # With topk < 0 more candidates are wanted than there can be.
    wanted = max(CANDIDATES_PER_DETECTION * topk, 1) if topk >= 0 else scores.numel() + 1
    looked_at, pool = 0, None
    while True:
        best = _best_candidates(scores, score_thresh, wanted)
        rois, classes, values = (column[looked_at:] for column in best)
        fresh = (_boxes_at(boxes, rois, classes, image_shape), values, classes, rois)
        # Worse candidates cannot change the survivors, nor can the suppressed change those.
        pool = fresh if pool is None else tuple(map(torch.cat, zip(pool, fresh, strict=True)))
        keep = _nms_by_class(pool[0], pool[2], image_shape, nms_thresh)
        pool = tuple(column[keep] for column in pool)
        if len(best[0]) < wanted or len(keep) >= topk >= 0:
            break
        looked_at, wanted = wanted, 2 * wanted
    pred_boxes, values, classes, rois = (c[:topk] for c in pool) if topk >= 0 else pool
    fields = {"pred_boxes": Boxes(pred_boxes), "scores": values, "pred_classes": classes}
    return Instances(image_shape, **fields), rois


def _detect_traceably(boxes, scores, image_shape, score_thresh, nms_thresh, topk):
    """As :func:`_detect`, without steps that a trace would record as they were for its example."""
    num_classes, flat = scores.shape[1] - 1, scores[:, :-1].flatten()
    found = (flat > score_thresh).nonzero().flatten()
    # ONNX's sort is stable and has no such argument.
    stable = {} if torch.onnx.is_in_onnx_export() else {"stable": True}
    values, order = flat[found].sort(descending=True, **stable)
    if topk >= 0:
        values, order = values[:TRACED_CANDIDATES], order[:TRACED_CANDIDATES]
    found = found[order]
    rois = found.div(num_classes, rounding_mode="floor")
    classes = found - rois * num_classes
    chosen = _boxes_at(boxes, rois, classes, image_shape)
    # Classes are moved apart in two dimensions: in float32, all that ONNX's NMS takes, the
    # coordinates of a thousand classes side by side would be off by a tenth of a pixel.
    side = math.isqrt(num_classes - 1) + 1
    row = classes.div(side, rounding_mode="floor")
    height, width = image_shape
    shift = torch.stack([(classes - row * side) * (width + 1), row * (height + 1)], dim=1)
    ranks = classes.shape[0] - torch.arange(classes.shape[0], device=values.device)
    keep = nms(chosen.float() + shift.float().repeat(1, 2), ranks.float(), nms_thresh)
    keep = keep[:topk] if topk >= 0 else keep
    fields = {"scores": values[keep], "pred_classes": classes[keep]}
    return Instances(image_shape, pred_boxes=Boxes(chosen[keep]), **fields), rois[keep]


def _drop_non_finite(boxes, scores):
    """Leave out the RoIs that have a box or a score that is not finite."""
    # A finite norm proves finite entries. Should that of finite ones overflow, the exact test
    # below is redundant but harmless.
    lazy = isinstance(boxes, BoxDeltas)
    finite = boxes.surely_finite() if lazy else _norm(boxes).isfinite()
    if finite & _norm(scores).isfinite():
        return boxes, scores
    boxes = boxes.decode() if lazy else boxes
    valid = boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1)
    return boxes[valid], scores[valid]


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    """Euclidean norm, a bound of every entry in one pass without temporaries."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor.detach(), dtype=dtype)


def _best_candidates(scores: torch.Tensor, score_thresh: float, wanted: int):
    """RoIs, classes and scores, (n,) each, of the ``wanted`` best candidates, or of all."""
    flat = scores.flatten()
    bound, num_blocks = -torch.inf, len(flat) // BLOCK
    if num_blocks >= wanted:
        # Each maximum is the score of another candidate, so at least as many as wanted reach the
        # least of the best maxima, and nothing below it is needed. (A topk of all takes longer.)
        maxima = flat[: BLOCK * num_blocks].view(BLOCK, num_blocks).amax(dim=0)
        bound = maxima.topk(wanted, sorted=False).values.min()
    found = (flat >= bound).nonzero().flatten()
    found = found[flat[found] > score_thresh]
    values, order = flat[found].sort(stable=True, descending=True)
    found = found[order[:wanted]]
    return found // scores.shape[1], found % scores.shape[1], values[:wanted]


def _boxes_at(boxes, rois, classes, image_shape):
    """Clipped boxes (n, 4) of the candidates."""
    deltas = boxes.deltas if isinstance(boxes, BoxDeltas) else boxes
    columns = torch.zeros_like(classes) if deltas.shape[1] == 4 else classes
    if isinstance(boxes, BoxDeltas):
        chosen = Boxes(boxes.decode_at(rois, columns))
    else:
        chosen = Boxes(boxes.unflatten(1, (-1, 4))[rois, columns])
    chosen.clip(image_shape)
    return chosen.tensor


def _nms_by_class(boxes, classes, image_shape, nms_thresh):
    """Indices (num kept,) of the candidates, best first, that NMS within each class keeps."""
    # Ranks order the candidates as their scores do, without ties.
    ranks = torch.arange(len(boxes), 0, -1, device=boxes.device)
    if len(boxes) > SINGLE_NMS_LIMIT:
        return batched_nms(boxes, ranks.float(), classes, nms_thresh)
    # Classes moved apart never overlap. In float64 that changes no IoU by more than 1e-8.
    shift = classes.double() * (max(image_shape) + 1)
    return nms(boxes.double() + shift[:, None], ranks.double(), nms_thresh)
