"""Stage 1 on LVIS v1: Mask R-CNN R50-FPN with a softmax classifier, the recipe of the BAGS paper.

The LazyConfig of ../lvis_baseline_mask_R50.yaml. To plug the heads into another detector, replace
``model`` by that of its config and give it these RoI heads.
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.model_zoo import get_config
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from bags_d2.config.lazy import clipped_sgd, known_class_counts, trainable_params
from bags_d2.evaluation import LongTailLVISEvaluator
from bags_d2.modeling import FastRCNNOutputLayers, LongTailROIHeads

MAX_ITER = 75_100  # 12 epochs of 100,170 images at batch 16

model = get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up.freeze_at = 2
model.proposal_generator.smooth_l1_beta = 0.1111
model.roi_heads._target_ = LongTailROIHeads
model.roi_heads.num_classes = 1203
model.roi_heads.box_predictor._target_ = FastRCNNOutputLayers
model.roi_heads.box_predictor.update(
    smooth_l1_beta=1.0, test_score_thresh=0.0, test_topk_per_image=300
)

dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.dataset.names = "lvis_v1_train"
dataloader.train.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333),
    L(T.RandomFlip)(horizontal=True),
]
dataloader.test.dataset.names = "lvis_v1_val"
dataloader.evaluator = L(LongTailLVISEvaluator)(
    dataset_name="${..test.dataset.names}",
    class_counts=L(known_class_counts)(
        dataset_name="${dataloader.train.dataset.names}",
        num_classes="${model.roi_heads.num_classes}",
    ),
)

optimizer = L(clipped_sgd)(
    params=L(trainable_params)(globs=(), weight_decay_norm=0.0),
    max_norm=35.0,
    lr=0.01,
    momentum=0.9,
    weight_decay=1e-4,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[50_100, 68_900, MAX_ITER]
    ),
    warmup_length=500 / MAX_ITER,
    warmup_factor=1 / 3,
)

# What a method of stage 2 starts from.
stage2 = {"weights": "output/lazy/lvis_baseline_mask_R50/model_final.pth", "max_iter": MAX_ITER}

train = get_config("common/train.py").train
train.max_iter = MAX_ITER
train.eval_period = MAX_ITER
train.output_dir = "output/lazy/lvis_baseline_mask_R50"
train.init_checkpoint = (
    "detectron2://COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x/137260431/model_final_a54504.pkl"
)
