"""This package's configs and carried checkpoints, with the functions of Detectron2's model zoo.

::

    from bags_d2 import model_zoo

    cfg = model_zoo.get_config("lvis_bags_R50.yaml")
    model = model_zoo.get("glyphs_bags.yaml", trained=True)
"""

from .model_zoo import get, get_checkpoint, get_config, get_config_file, list_configs

__all__ = ["get", "get_checkpoint", "get_config", "get_config_file", "list_configs"]
