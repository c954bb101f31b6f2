"""What a checkpoint's classifier looks like from outside."""

from collections.abc import Mapping

import torch

from ..errors import DataError
from ..modeling.groups import ClassGroups

__all__ = ["class_weight_norms"]

_PREDICTOR = "roi_heads.box_predictor."


def class_weight_norms(state_dict: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """L2 norm of each foreground class's weight vector (the paper's Figure 1).

    Works on softmax and grouped classifiers; of a cascade, the mean over its stages.

    Args:
        state_dict: the "model" entry of a checkpoint.

    Returns:
        Tensor (K,).

    Raises:
        DataError: if there is no box classifier in it.
    """
    suffix = "cls_score.weight"
    names = [k for k in state_dict if k.startswith(_PREDICTOR) and k.endswith(suffix)]
    if not names:
        raise DataError(f"The checkpoint has no '{_PREDICTOR}*{suffix}': not a box classifier.")
    norms = []
    for name in names:
        weight = torch.as_tensor(state_dict[name]).float()
        prefix = name.removesuffix(suffix) + "groups."
        if prefix + "class_to_group" in state_dict:
            groups = ClassGroups(
                state_dict[prefix + "class_to_group"],
                state_dict[prefix + "class_counts"],
                state_dict[prefix + "thresholds"].tolist(),
            )
            weight = weight[groups.class_to_column]
        else:
            weight = weight[:-1]  # background is Detectron2's last row
        norms.append(weight.norm(dim=1))
    return torch.stack(norms).mean(dim=0)
