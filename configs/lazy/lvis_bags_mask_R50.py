"""Stage 2 on LVIS v1: the same detector with a grouped classifier, which alone is trained.

The LazyConfig of ../lvis_bags_mask_R50.yaml.
"""

from bags_d2.config.lazy import to_bags

from .lvis_baseline_mask_R50 import dataloader as dataloader
from .lvis_baseline_mask_R50 import lr_multiplier as lr_multiplier
from .lvis_baseline_mask_R50 import model, optimizer, stage2, train

to_bags(model, optimizer, train, stage2)
train.output_dir = "output/lazy/lvis_bags_mask_R50"
