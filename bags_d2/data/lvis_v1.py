"""Class counts of LVIS v1's training set, which this package carries."""

import functools
import json
from importlib import resources


@functools.cache
def lvis_v1_counts() -> dict[str, list[int]]:
    """Training ``instance_count`` and ``image_count`` of LVIS v1, by category id 1..1203."""
    text = resources.files(__package__).joinpath("lvis_v1_train_counts.json").read_text("utf-8")
    content = json.loads(text)
    return {key: content[key] for key in ("instance_count", "image_count")}
