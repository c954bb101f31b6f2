"""Stage 2 of Swin-B on LVIS v1: grouped classifiers on Detectron2's published detector.

They take the place of its sigmoids with federated loss; all else is frozen.
"""

from bags_d2.config.lazy import to_bags

from .lvis_baseline_cascade_mask_swin_b import dataloader as dataloader
from .lvis_baseline_cascade_mask_swin_b import lr_multiplier as lr_multiplier
from .lvis_baseline_cascade_mask_swin_b import model, optimizer, stage2, train

to_bags(model, optimizer, train, stage2)
train.output_dir = "output/lazy/lvis_bags_cascade_mask_swin_b"
