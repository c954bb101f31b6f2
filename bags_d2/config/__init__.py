"""Config keys, and config files with the methods that are laid over them."""

from .defaults import add_bags_config
from .files import (
    BASELINE,
    CONFIGS,
    find_config,
    list_methods,
    merge_config_file,
    read_config_file,
    run_name,
    scale_schedule,
)
from .renamed import current_name, former_names, long_tail, rename_keys, rename_options

__all__ = [
    "BASELINE",
    "CONFIGS",
    "add_bags_config",
    "current_name",
    "find_config",
    "former_names",
    "list_methods",
    "long_tail",
    "merge_config_file",
    "read_config_file",
    "rename_keys",
    "rename_options",
    "run_name",
    "scale_schedule",
]
