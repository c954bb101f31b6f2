"""Exact top-k detection for thousands of classes.

Detectron2 decodes a box for every (RoI, class), thresholds the scores and runs NMS on all that is
left: up to a million candidates, of which 300 are kept. But NMS drops a candidate only for the
sake of a *better-scored* one of its class. So the m best candidates decide among themselves which
of them survive, and if k or more do, the first k of these are the detections. Here m starts at a
few times k and grows while fewer survive; only the candidates looked at are ever decoded.

Shapes in this file: R RoIs of one image, K foreground classes, B = K boxes for a RoI or B = 1 if
all classes share one, n candidates. A candidate is a (RoI, class) whose score exceeds the
threshold. Candidates go by falling score, those of equal score by RoI and class. (Detectron2 runs
NMS in this order too, but may then return detections of equal score in any order.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from detectron2.structures.boxes import matched_pairwise_iou
from torchvision.ops import nms

__all__ = ["BoxDeltas", "fast_rcnn_inference_topk"]

# Up to so many candidates torchvision's batched_nms may separate the classes by moving their
# boxes apart, which rounds coordinates by an amount that depends on all the candidates. Beyond,
# it goes class by class. (In versions since 0.19 the limits are these or lower.)
MOVED_NMS_LIMIT_CPU = 1_000
MOVED_NMS_LIMIT_CUDA = 25_000

# Candidates looked at first, for each detection wanted. Several proposals see an object, and each
# in several classes, so of a trained detector's best candidates perhaps one in five survives.
CANDIDATES_PER_DETECTION = 8

# RoIs over which maxima are taken to bound the m-th best score.
BLOCK = 16

# A class of more candidates than this is cheaper to hand to nms() than to compare pair by pair.
PAIRWISE_LIMIT = 64

# IoUs this close to the threshold are left to nms() itself, since the last bit of its arithmetic
# is its own affair. Many times what a handful of roundings in float32 amounts to.
IOU_MARGIN = 1e-5


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

    @property
    def shape(self) -> torch.Size:
        return self.deltas.shape

    def decode(self) -> torch.Tensor:
        """All boxes (R, 4 * B), not clipped."""
        return self.transform.apply_deltas(self.deltas, self.proposals)

    def decode_at(self, rois: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The boxes (n, 4), not clipped, at indices (n,) into the RoIs and into the B boxes."""
        deltas = self.deltas.unflatten(1, (-1, 4))[rois, columns]
        return self.transform.apply_deltas(deltas, self.proposals[rois])

    def surely_finite(self) -> torch.Tensor:
        """Bool scalar: if True, every box decodes to finite numbers; False leaves that open.

        Euclidean norms bound the entries, are not finite where one of them is not, and take one
        pass without temporaries. Under these bounds nothing in decoding exceeds 1e34: the largest
        terms are (delta / weight) * width and exp(scale_clamp) * width.
        """
        deltas = torch.linalg.vector_norm(self.deltas.detach(), dtype=torch.float32)
        proposals = torch.linalg.vector_norm(self.proposals.detach(), dtype=torch.float32)
        usual = min(self.transform.weights) >= 1e-3 and self.transform.scale_clamp <= 10
        return (deltas < 1e15) & (proposals < 1e15) & usual


def fast_rcnn_inference_topk(
    boxes: Sequence[torch.Tensor | BoxDeltas],
    scores: Sequence[torch.Tensor],
    image_shapes: Sequence[tuple[int, int]],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
) -> tuple[list[Instances], list[torch.Tensor]]:
    """What Detectron2's ``fast_rcnn_inference`` returns, in the same order, for less work.

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
        Detectron2.
    """
    if torch.jit.is_tracing():
        # A trace would repeat whatever the search did for the example that it is recorded with.
        boxes = [b.decode() if isinstance(b, BoxDeltas) else b for b in boxes]
        options = (score_thresh, nms_thresh, topk_per_image)
        return fast_rcnn_inference(boxes, scores, image_shapes, *options)
    results = [
        _inference_single_image(*image, score_thresh, nms_thresh, topk_per_image)
        for image in zip(boxes, scores, image_shapes, strict=True)
    ]
    return [instances for instances, _ in results], [rois for _, rois in results]


def _inference_single_image(
    boxes: torch.Tensor | BoxDeltas,
    scores: torch.Tensor,
    image_shape: tuple[int, int],
    score_thresh: float,
    nms_thresh: float,
    topk: int,
) -> tuple[Instances, torch.Tensor]:
    boxes, scores = _drop_non_finite(boxes, scores)
    scores = scores[:, :-1]  # (R, K)
    limit = MOVED_NMS_LIMIT_CPU if scores.device.type == "cpu" else MOVED_NMS_LIMIT_CUDA
    # With topk < 0 more candidates are wanted than there can be.
    wanted = CANDIDATES_PER_DETECTION * topk if topk >= 0 else scores.numel() + 1
    wanted = max(wanted, limit + 1)
    looked_at, survivors = 0, None
    while True:
        best = _best_candidates(scores, score_thresh, wanted)
        num_found = len(best[0])
        rois, classes, best_scores = (column[looked_at:] for column in best)
        pool = (_boxes_at(boxes, rois, classes, image_shape), best_scores, classes, rois)
        if survivors is not None:
            # Worse candidates cannot change the survivors, nor can the suppressed change those.
            pool = tuple(torch.cat(columns) for columns in zip(survivors, pool, strict=True))
        pool_boxes, _, pool_classes, _ = pool
        if num_found <= limit:
            # As wanted > limit, these are all there are, so that batched_nms does with them
            # whatever it does for Detectron2.
            keep = batched_nms(pool_boxes, _ranks(pool_boxes), pool_classes, nms_thresh)
        else:
            keep = _nms_by_class(pool_boxes, pool_classes, nms_thresh)
        survivors = tuple(column[keep] for column in pool)
        if num_found < wanted or len(keep) >= topk >= 0:
            break
        looked_at, wanted = wanted, 2 * wanted
    if topk >= 0:
        survivors = tuple(column[:topk] for column in survivors)
    pred_boxes, pred_scores, pred_classes, rois = survivors
    fields = {"pred_boxes": Boxes(pred_boxes), "scores": pred_scores, "pred_classes": pred_classes}
    return Instances(image_shape, **fields), rois


def _drop_non_finite(
    boxes: torch.Tensor | BoxDeltas, scores: torch.Tensor
) -> tuple[torch.Tensor | BoxDeltas, torch.Tensor]:
    """Leave out the RoIs that have a box or a score that is not finite."""
    # A finite sum proves finite terms. Should a sum of finite terms overflow, the exact test
    # below is made in vain, which does no harm.
    lazy = isinstance(boxes, BoxDeltas)
    finite = boxes.surely_finite() if lazy else _sum(boxes).isfinite()
    if finite & _sum(scores).isfinite():
        return boxes, scores
    boxes = boxes.decode() if lazy else boxes
    valid = boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1)
    return boxes[valid], scores[valid]


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().sum(dtype=torch.float32)


def _best_candidates(
    scores: torch.Tensor, score_thresh: float, wanted: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ``wanted`` best candidates in order, or all if they are fewer.

    Args:
        scores: (R, K).
        score_thresh: candidates must score more than this.
        wanted: how many to return at most.

    Returns:
        RoIs, classes and scores, (n,) each.
    """
    maxima = _block_maxima(scores)
    if maxima.numel() < wanted:
        rois, classes = (scores > score_thresh).nonzero(as_tuple=True)
    else:
        # Each maximum is the score of another pair, so at least as many as wanted reach this
        # bound, and nothing below it is needed. The topk of all scores would take far longer.
        bound = maxima.flatten().topk(wanted, sorted=False).values.min()
        if bound > score_thresh:
            rois, classes = _search_blocks(scores, maxima, lambda score: score >= bound)
        else:
            rois, classes = _search_blocks(scores, maxima, lambda score: score > score_thresh)
    values = scores[rois, classes]
    order = values.argsort(stable=True, descending=True)[:wanted]
    return rois[order], classes[order], values[order]


def _block_maxima(scores: torch.Tensor) -> torch.Tensor:
    """Best score of each class (columns) among every BLOCK RoIs in turn (rows)."""
    scores = scores.detach()
    num_full = len(scores) // BLOCK
    full, rest = scores.tensor_split([num_full * BLOCK])
    maxima = full.unflatten(0, (num_full, BLOCK)).amax(dim=1)
    return torch.cat([maxima, rest.amax(dim=0, keepdim=True)]) if len(rest) else maxima


def _search_blocks(
    scores: torch.Tensor, maxima: torch.Tensor, exceeds: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``exceeds(scores).nonzero(as_tuple=True)``, reading only the blocks whose maxima exceed."""
    block, classes = exceeds(maxima).nonzero(as_tuple=True)
    rois = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)
    flat = rois * scores.shape[1] + classes[:, None]
    in_range = rois < len(scores)  # the last block may be short
    rows = rois.clamp(max=len(scores) - 1)
    flat = flat[in_range & exceeds(scores[rows, classes[:, None]])].sort().values
    return flat // scores.shape[1], flat % scores.shape[1]


def _boxes_at(
    boxes: torch.Tensor | BoxDeltas,
    rois: torch.Tensor,
    classes: torch.Tensor,
    image_shape: tuple[int, int],
) -> torch.Tensor:
    """Clipped boxes (n, 4) of the candidates."""
    columns = torch.zeros_like(classes) if boxes.shape[1] == 4 else classes
    if isinstance(boxes, BoxDeltas):
        chosen = Boxes(boxes.decode_at(rois, columns))
    else:
        chosen = Boxes(boxes.unflatten(1, (-1, 4))[rois, columns])
    chosen.clip(image_shape)
    return chosen.tensor


def _nms_by_class(boxes: torch.Tensor, classes: torch.Tensor, nms_thresh: float) -> torch.Tensor:
    """NMS within each class, as by calling ``nms`` for every class by itself.

    A call of ``nms`` costs more than all it does for a handful of boxes, and among the best
    candidates most classes have no more than that. So the pairs of such classes are compared all
    at once; ``nms`` is called for large classes and for those in which rounding could matter.

    Args:
        boxes: (n, 4), best first.
        classes: (n,).
        nms_thresh: IoU above which a candidate gives way.

    Returns:
        Indices (num kept,) of the survivors, best first.
    """
    by_class = classes.argsort(stable=True)  # (n,), class by class, best first in each
    _, sizes = classes[by_class].unique_consecutive(return_counts=True)  # (num classes,)
    ends = sizes.cumsum(0)
    class_of = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    by_nms = sizes > PAIRWISE_LIMIT

    # Each position is paired with all positions behind it in its class.
    position = torch.arange(len(by_class), device=sizes.device)
    num_behind = ends[class_of] - position - 1
    num_behind = num_behind.masked_fill(by_nms[class_of], 0)
    first = position.repeat_interleave(num_behind)
    run_start = (num_behind.cumsum(0) - num_behind).repeat_interleave(num_behind)
    second = first + 1 + torch.arange(len(first), device=sizes.device) - run_start
    better, worse = by_class[first], by_class[second]
    iou = matched_pairwise_iou(Boxes(boxes[better]), Boxes(boxes[worse]))
    # Disjoint boxes are so without any rounding, which spares nms() for a threshold of 0.
    by_nms[class_of[first[((iou - nms_thresh).abs() <= IOU_MARGIN) & (iou > 0)]]] = True

    # A candidate survives unless a better one that overlaps it survives. Applied again and again
    # from "all survive", this settles the best of each class, then the next, at the latest after
    # PAIRWISE_LIMIT rounds and in practice after a few.
    overlapping = iou > nms_thresh
    better, worse = better[overlapping], worse[overlapping]
    survives, previous = torch.ones_like(classes, dtype=torch.bool), None
    while previous is None or not torch.equal(survives, previous):
        previous, survives = survives, torch.ones_like(survives)
        survives[worse[previous[better]]] = False

    for start, end in torch.stack([ends - sizes, ends], dim=1)[by_nms].tolist():
        members = by_class[start:end]
        survives[members] = False
        survives[members[nms(boxes[members], _ranks(members), nms_thresh)]] = True
    return survives.nonzero().flatten()


def _ranks(candidates: torch.Tensor) -> torch.Tensor:
    """Scores for NMS of candidates in order: unlike their own, without ties and always float32."""
    return torch.arange(len(candidates), 0, -1, dtype=torch.float32, device=candidates.device)
