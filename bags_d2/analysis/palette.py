"""The colour-blind-safe colours of Okabe and Ito, the same in all charts and pictures."""

__all__ = ["RIGHT", "TRUTH", "WRONG", "bin_color", "run_color"]

_RUNS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#D55E00")
# Of groups by training count: the rarer, the warmer.
_BINS = ("#D55E00", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#56B4E9", "#999999", "#000000")
RIGHT = "#0072B2"
WRONG = "#D55E00"
TRUTH = "#009E73"


def run_color(i: int) -> str:
    return _RUNS[i % len(_RUNS)]


def bin_color(i: int) -> str:
    return _BINS[i % len(_BINS)]
