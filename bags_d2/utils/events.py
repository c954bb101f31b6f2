"""Detectron2's writers of scalars, with metrics.json in strict JSON."""

import json
import os
from typing import TextIO

from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)


def default_writers(output_dir: str, max_iter: int | None = None) -> list[EventWriter]:
    """The writers of ``detectron2.engine.default_writers``, but for NaN in ``metrics.json``."""
    os.makedirs(output_dir, exist_ok=True)
    return [
        CommonMetricPrinter(max_iter),
        StrictJSONWriter(os.path.join(output_dir, "metrics.json")),
        TensorboardXWriter(output_dir),
    ]


class StrictJSONWriter(JSONWriter):
    """Writes null for NaN and infinity, which JSON lacks, such as APs that nothing defines."""

    def __init__(self, json_file: str, window_size: int = 20) -> None:
        super().__init__(json_file, window_size)
        self._file_handle = _StrictLines(self._file_handle)


class _StrictLines:
    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, line: str) -> None:
        content = json.loads(line, parse_constant=lambda _: None)
        self._file.write(json.dumps(content, sort_keys=True) + "\n")

    def __getattr__(self, name: str):
        return getattr(self._file, name)
