"""The masks of an annotation file: polygons in one array, run-length codes beside it."""

import functools
import itertools
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils

__all__ = ["Masks"]

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
        self._codes: dict[int, dict] = {}
        self._faults: dict[int, str] = {}

    def append(self, segmentation: Any) -> None:
        """Take the "segmentation" of the next annotation: polygons, run-length code, or none."""
        row = len(self._first) - 1
        if isinstance(segmentation, list):
            # A flat list of numbers is one polygon.
            flat = segmentation and isinstance(segmentation[0], int | float)
            self._append_polygons(row, [segmentation] if flat else segmentation)
        elif isinstance(segmentation, dict):
            self._codes[row] = segmentation
        elif segmentation is not None:
            self._faults[row] = f"segmentation {str(segmentation)[:60]!r}"
        self._first.append(len(self._ends) - 1)

    def _append_polygons(self, row: int, polygons: list) -> None:
        for polygon in polygons:
            try:
                if isinstance(polygon, str):
                    raise TypeError
                self._numbers.extend(polygon)
            except (TypeError, OverflowError):
                self._faults[row] = f"a polygon {str(polygon)[:60]}"
            if len(self._numbers) > self._ends[-1]:
                length = len(self._numbers) - self._ends[-1]
                if length < 6 or length % 2:
                    self._faults.setdefault(row, f"a polygon of {length} numbers")
                if length % 2:  # x and y keep alternating in the array
                    self._numbers.append(0.0)
                self._ends.append(len(self._numbers))

    def close(self) -> None:
        """Everything is appended; note which coordinates are not finite or would overflow."""
        self._numbers = np.frombuffer(self._numbers) if self._numbers else np.empty(0)
        self._ends, self._first = np.array(self._ends), np.array(self._first)
        bad = np.flatnonzero(~(np.abs(self._numbers) <= MAX_COORDINATE))
        polygons = np.searchsorted(self._ends, bad, side="right") - 1
        for row in np.unique(np.searchsorted(self._first, polygons, side="right") - 1).tolist():
            fault = f"a polygon with coordinates beyond {MAX_COORDINATE:g}"
            self._faults.setdefault(row, fault)

    def get(self, row: int, image: Mapping, as_json: bool = False) -> list | dict | None:
        """A mask as polygons or compressed run-length code; None if there is none, or a faulty one.

        Args:
            row: the annotation.
            image: with "height" and "width".
            as_json: lists and text instead of arrays and bytes.
        """
        if row in self._faults:
            return None
        if row in self._codes:
            code = self._codes[row]
            return None if _fault_of_code(code, image) else _compressed(code, image, as_json)
        polygons = self._polygons(row)
        return ([p.tolist() for p in polygons] if as_json else polygons) or None

    @functools.cached_property
    def polygon_areas(self) -> np.ndarray:
        """(N,) in pixels, polygons taken as disjoint; 0 without polygons or with faulty ones."""
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
        of_annotation = np.repeat(np.arange(len(areas)), np.diff(self._first))
        np.add.at(areas, of_annotation, of_polygon)
        areas[list(self._faults)] = 0
        return areas

    def area(self, row: int, image: Mapping) -> float:
        """In pixels; 0 without a mask."""
        if row in self._codes and not self.fault(row, image):
            return float(sum(_runs(self._codes[row]["counts"])[1::2]))
        return float(self.polygon_areas[row])

    def is_code(self, row: int) -> bool:
        """Whether the mask is in run-length code."""
        return row in self._codes

    def fault(self, row: int, image: Mapping) -> str:
        """What is wrong with a mask in words, "" for a good one and for none."""
        if row in self._faults:
            return self._faults[row]
        return _fault_of_code(self._codes[row], image) if row in self._codes else ""

    def _polygons(self, row: int) -> list[np.ndarray]:
        ends = self._ends[self._first[row] : self._first[row + 1] + 1].tolist()
        return [self._numbers[a:b] for a, b in itertools.pairwise(ends)]


def _fault_of_code(code: dict, image: Mapping) -> str:
    size = [image["height"], image["width"]]
    if code.get("size") != size:
        return f"a run-length code of size {code.get('size')} in an image of {size}"
    try:
        runs = _runs(code.get("counts"))
    except ValueError:
        return "a run-length code that is cut off or of no known form"
    if min(runs, default=0) < 0 or sum(runs) != size[0] * size[1]:
        return "a run-length code that does not cover its image once"
    return ""


def _runs(counts: Any) -> list[int]:
    """Lengths of the alternating runs of background and mask.

    Raises:
        ValueError: if ``counts`` are neither such lengths nor COCO's text for them.
    """
    if isinstance(counts, list):
        if not all(type(n) is int for n in counts):
            raise ValueError
        return counts
    if not isinstance(counts, str):
        raise ValueError
    # Of each run from the third on, the difference from the one before the last is written, five
    # bits a character, lowest first; the sixth bit says that more follow, the last has the sign.
    runs, value, shift = [], 0, 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError
    return runs


def _compressed(code: dict, image: Mapping, as_json: bool) -> dict:
    counts = code["counts"]
    if isinstance(counts, list):
        counts = mask_utils.frPyObjects(code, image["height"], image["width"])["counts"].decode()
    return {"size": code["size"], "counts": counts if as_json else counts.encode()}
