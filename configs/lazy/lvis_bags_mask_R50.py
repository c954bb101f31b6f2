"""Stage 2 on LVIS v1: the same detector with a grouped classifier, which alone is trained.

The LazyConfig of ../lvis_bags_mask_R50.yaml.
"""

from detectron2.config import LazyCall as L

from bags_d2 import BAGSOutputLayers
from bags_d2.config.lazy import groups_of

from .lvis_baseline_mask_R50 import NUM_CLASSES, TRAIN, model, optimizer, train
from .lvis_baseline_mask_R50 import dataloader as dataloader
from .lvis_baseline_mask_R50 import lr_multiplier as lr_multiplier

model.roi_heads.box_predictor._target_ = BAGSOutputLayers
model.roi_heads.box_predictor.update(
    groups=L(groups_of)(
        dataset_name=TRAIN, num_classes=NUM_CLASSES, thresholds=(10, 100, 1000), by="instances"
    ),
    others_sample_ratio=8.0,
)
optimizer.params.globs = ("roi_heads.box_predictor*cls_score.*",)
train.init_checkpoint = "output/lazy/lvis_baseline_mask_R50/model_final.pth"
train.output_dir = "output/lazy/lvis_bags_mask_R50"
