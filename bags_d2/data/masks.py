"""The masks of an annotation file: polygons in one array, run-length codes beside it."""

import functools
import itertools
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils

# pycocotools rasterizes polygons with integers that overflow on larger coordinates.
MAX_COORDINATE = 1e5


class Masks:
    """Masks of N annotations, appended one by one and then closed.

    A list of floats for each polygon would take five times the memory of one array, a gigabyte
    more for LVIS v1.
    """

    def __init__(self) -> None:
        self._numbers = array("d")
        self._ends = array("q", [0])  # of the polygons, in _numbers
        self._first = array("q", [0])  # polygon of each annotation, in _ends
        self._codes: dict[int, tuple[dict, Mapping]] = {}
        self._faults: dict[int, str] = {}

    def append(self, segmentation: Any, image: Mapping) -> None:
        """Take the "segmentation" of the next annotation: polygons, run-length code, or none."""
        row = len(self._first) - 1
        if isinstance(segmentation, dict):
            self._codes[row] = segmentation, image
        elif isinstance(segmentation, list):
            # A flat list of numbers is one polygon.
            flat = segmentation and isinstance(segmentation[0], int | float)
            for polygon in [segmentation] if flat else segmentation:
                self._append_polygon(row, polygon)
        elif segmentation is not None:
            self._faults[row] = f"segmentation {str(segmentation)[:60]!r}"
        self._first.append(len(self._ends) - 1)

    def _append_polygon(self, row: int, polygon: Any) -> None:
        try:
            self._numbers.extend(polygon if isinstance(polygon, list) else None)
        except (TypeError, OverflowError):
            self._faults[row] = f"a polygon {str(polygon)[:60]}"
        length = len(self._numbers) - self._ends[-1]
        if length % 2:
            self._numbers.append(0.0)  # x and y keep alternating in the array
        if length:
            self._ends.append(len(self._numbers))
            if length < 6 or length % 2:
                self._faults.setdefault(row, f"a polygon of {length} numbers")

    def close(self) -> None:
        """Everything is appended; note which coordinates are not finite or would overflow."""
        self._numbers = np.frombuffer(self._numbers) if self._numbers else np.empty(0)
        self._ends, self._first = np.array(self._ends), np.array(self._first)
        bad = np.flatnonzero(~(np.abs(self._numbers) <= MAX_COORDINATE))
        polygons = np.searchsorted(self._ends, bad, side="right") - 1
        for row in np.unique(np.searchsorted(self._first, polygons, side="right") - 1).tolist():
            self._faults.setdefault(row, f"a polygon with coordinates beyond {MAX_COORDINATE:g}")

    def get(self, row: int, as_json: bool = False) -> list | dict | None:
        """A mask as polygons or compressed run-length code; None if there is none, or a faulty one.

        ``as_json`` gives lists and text instead of arrays and bytes.
        """
        if self.fault(row):
            return None
        if row in self._codes:
            code, image = self._codes[row]  # its own sides may be floats
            counts, size = code["counts"], [image["height"], image["width"]]
            if isinstance(counts, list):
                counts = mask_utils.frPyObjects(code, *size)["counts"].decode()
            return {"size": size, "counts": counts if as_json else counts.encode()}
        ends = self._ends[self._first[row] : self._first[row + 1] + 1].tolist()
        polygons = [self._numbers[a:b] for a, b in itertools.pairwise(ends)]
        return ([p.tolist() for p in polygons] if as_json else polygons) or None

    def fault(self, row: int) -> str:
        """What is wrong with a mask in words, "" for a good one and for none."""
        return self._faults.get(row) or self._measured_codes.get(row, ("", 0))[0]

    @functools.cached_property
    def is_code(self) -> np.ndarray:
        """(N,) whether a mask is in run-length code."""
        return np.isin(np.arange(len(self._first) - 1), list(self._codes))

    @functools.cached_property
    def areas(self) -> np.ndarray:
        """(N,) in pixels, polygons taken as disjoint; 0 without a mask or with a faulty one."""
        areas = np.zeros(len(self._first) - 1)
        of_polygon = np.empty(len(self._ends) - 1)
        for start in range(0, len(of_polygon), 10_000):  # for temporary arrays of modest size
            ends = self._ends[start : start + 10_001]
            x, y = self._numbers[ends[0] : ends[-1]].reshape(-1, 2).T
            first = (ends[:-1] - ends[0]) // 2
            following = np.arange(1, len(x) + 1)
            following[(ends[1:] - ends[0]) // 2 - 1] = first
            with np.errstate(all="ignore"):  # faulty ones may hold anything
                crosses = x * y[following] - x[following] * y
                of_polygon[start : start + 10_000] = 0.5 * np.abs(np.add.reduceat(crosses, first))
        np.add.at(areas, np.repeat(np.arange(len(areas)), np.diff(self._first)), of_polygon)
        areas[list(self._faults)] = 0
        for row, (_, area) in self._measured_codes.items():
            areas[row] = area
        return areas

    @functools.cached_property
    def _measured_codes(self) -> dict[int, tuple[str, int]]:
        """Fault and area of each run-length code; read when they are asked for."""
        return {row: _measure(*code) for row, code in self._codes.items()}


def _measure(code: dict, image: Mapping) -> tuple[str, int]:
    size, counts = [image["height"], image["width"]], code.get("counts")
    if code.get("size") != size:
        return f"a run-length code of size {code.get('size')} in an image of {size}", 0
    try:
        runs = _runs(counts) if isinstance(counts, str) else counts
        if not isinstance(runs, list) or not all(type(n) is int for n in runs):
            raise ValueError
    except ValueError:
        return "a run-length code that is cut off or of no known form", 0
    if min(runs, default=0) < 0 or sum(runs) != size[0] * size[1]:
        return "a run-length code that does not cover its image once", 0
    return "", sum(runs[1::2])


def _runs(text: str) -> list[int]:
    """Lengths of the alternating runs of background and mask; ValueError if the text is faulty."""
    # Of each run from the third on, the difference from the one before the last is written, five
    # bits a character, lowest first; the sixth bit says that more follow, the last has the sign.
    runs, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= bool(bits & 16) << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError
    return runs
