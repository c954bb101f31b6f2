"""Reading JSON, with faults told as the user's to mend."""

import json
import os
from typing import Any

from ..errors import DataError

__all__ = ["load_json"]


def load_json(path: str | os.PathLike) -> Any:
    """Parse a JSON file.

    Args:
        path: a local file that exists.

    Raises:
        DataError: if it is cut off or otherwise not JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"'{os.fspath(path)}' is not valid JSON ({error}); download or build it again."
        ) from None
