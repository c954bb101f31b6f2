"""Config keys, and config files with the methods that are laid over them."""

from .defaults import add_bags_config
from .files import (
    find_config,
    list_methods,
    merge_config_file,
    read_config_file,
    run_name,
    scale_schedule,
)

__all__ = [
    "add_bags_config",
    "find_config",
    "list_methods",
    "merge_config_file",
    "read_config_file",
    "run_name",
    "scale_schedule",
]
