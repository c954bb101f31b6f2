"""Errors that a user can mend: each message names the file or key and the remedy.

Entry points print these as one sentence; anything else keeps its traceback.
"""

__all__ = ["BagsError", "ConfigError", "DataError", "MissingFileError"]


class BagsError(Exception):
    """Base of the errors below."""


class ConfigError(BagsError, ValueError):
    """A config key, or an argument that stands for one, has a value that cannot work."""


class DataError(BagsError, ValueError):
    """A data set or one of its files contradicts its format or the config."""


class MissingFileError(BagsError, FileNotFoundError):
    """A file that the config asks for does not exist."""
