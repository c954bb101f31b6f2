"""ViTDet (ViT-B) with Cascade Mask R-CNN on LVIS v1, in the recipe of Detectron2's own project.

Its classifiers are sigmoids with federated loss; the project publishes the result of training (AP
43.0, masks 38.9), which a stage 2 starts from. Needs timm and shapely: pip install "bags-d2[vit]".
"""

from functools import partial

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from bags_d2.config.lazy import federated_weights, trainable_params
from bags_d2.modeling import FastRCNNOutputLayers, LongTailCascadeROIHeads

from .lvis_baseline_mask_R50 import dataloader

SIZE = 1024
MAX_ITER = 156_250  # 100 epochs at batch 64

model = get_config("common/models/mask_rcnn_vitdet.py").model
for only_of_mask_rcnn in ("box_head", "box_predictor", "proposal_matcher"):
    model.roi_heads.pop(only_of_mask_rcnn)
model.roi_heads.update(
    _target_=LongTailCascadeROIHeads,
    average="probs",  # as Detectron2 does
    num_classes=1203,
    box_heads=[
        L(FastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels=256, height=7, width=7),
            conv_dims=[256, 256, 256, 256],
            fc_dims=[1024],
            conv_norm="LN",
        )
        for _ in range(3)
    ],
    box_predictors=[
        L(FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=1024),
            box2box_transform=L(Box2BoxTransform)(weights=(xy, xy, wh, wh)),
            num_classes="${...num_classes}",
            test_score_thresh=0.02,
            test_topk_per_image=300,
            cls_agnostic_bbox_reg=True,
            use_sigmoid_ce=True,
            use_fed_loss=True,
            get_fed_loss_cls_weights=L(federated_weights)(
                dataset_name="${dataloader.train.dataset.names}",
                num_classes="${model.roi_heads.num_classes}",
            ),
        )
        for xy, wh in ((10, 5), (20, 10), (30, 15))
    ],
    proposal_matchers=[
        L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
        for iou in (0.5, 0.6, 0.7)
    ],
)

dataloader.train.sampler = L(RepeatFactorTrainingSampler)(
    repeat_factors=L(RepeatFactorTrainingSampler.repeat_factors_from_category_frequency)(
        dataset_dicts="${dataloader.train.dataset}", repeat_thresh=0.001
    )
)
dataloader.train.total_batch_size = 64
dataloader.train.mapper.update(
    # Large-scale jittering, which crops boxes.
    augmentations=[
        L(T.RandomFlip)(horizontal=True),
        L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=SIZE, target_width=SIZE),
        L(T.FixedSizeCrop)(crop_size=(SIZE, SIZE), pad=False),
    ],
    image_format="RGB",
    recompute_boxes=True,
)
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=SIZE, max_size=SIZE)
]

optimizer = get_config("common/optim.py").AdamW
optimizer.params._target_ = trainable_params
optimizer.params.update(
    globs=(),
    lr_factor_func=partial(get_vit_lr_decay_rate, num_layers=12, lr_decay_rate=0.7),
    overrides={"pos_embed": {"weight_decay": 0.0}},
)
optimizer.lr = 2e-4
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[138_889, 150_463], num_updates=MAX_ITER
    ),
    warmup_length=250 / MAX_ITER,
    warmup_factor=0.001,
)

# What a method of stage 2 starts from, for 12 epochs.
stage2 = {
    "weights": "detectron2://ViTDet/LVIS/cascade_mask_rcnn_vitdet_b/329226874/"
    "model_final_df306f.pkl",
    "max_iter": 18_782,
}

train = get_config("common/train.py").train
train.amp.enabled = True
train.ddp.fp16_compression = True
train.max_iter = MAX_ITER
train.eval_period = 30_000
train.init_checkpoint = (
    "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"
)
train.output_dir = "output/lazy/lvis_baseline_cascade_mask_vitdet_b"
