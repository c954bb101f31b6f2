"""Swin-B, pretrained on ImageNet-21K, in the place of ViT-B: 50 epochs of the same recipe.

Detectron2's ViTDet project publishes the result of training (AP 44.0, masks 39.6), which a stage 2
starts from. Needs timm and shapely: pip install "bags-d2[vit]".
"""

from detectron2.config import LazyCall as L
from detectron2.modeling import FPN, SwinTransformer
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from .lvis_baseline_cascade_mask_vitdet_b import MAX_ITER, lr_multiplier, model, optimizer, train
from .lvis_baseline_cascade_mask_vitdet_b import dataloader as dataloader

model.backbone = L(FPN)(
    bottom_up=L(SwinTransformer)(
        depths=[2, 2, 18, 2], drop_path_rate=0.3, embed_dim=128, num_heads=[4, 8, 16, 32]
    ),
    in_features=("p0", "p1", "p2", "p3"),
    out_channels=256,
    norm="LN",
    top_block=L(LastLevelMaxPool)(),
    square_pad=1024,
)

optimizer.params.pop("lr_factor_func")
optimizer.params.overrides = {"relative_position_bias_table": {"weight_decay": 0.0}}
optimizer.lr = 1e-4
optimizer.weight_decay = 0.05
# The schedule scales with the number of steps, but for the warm-up.
lr_multiplier.warmup_length = 250 / (MAX_ITER // 2)

stage2 = {
    "weights": "detectron2://ViTDet/LVIS/cascade_mask_rcnn_swin_b_in21k/329222304/"
    "model_final_a3a348.pkl",
    "max_iter": 18_782,
}

train.max_iter = MAX_ITER // 2
train.init_checkpoint = "detectron2://ImageNetPretrained/swin/swin_base_patch4_window7_224_22k.pth"
train.output_dir = "output/lazy/lvis_baseline_cascade_mask_swin_b"
