"""The colour-blind-safe colours of Okabe and Ito, the same in all charts and pictures."""

__all__ = ["BETTER", "BIN_COLORS", "RIGHT", "RUN_COLORS", "TRUTH", "WORSE", "WRONG", "bin_color"]

RUN_COLORS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#D55E00")
# Of groups by training count: the rarer, the warmer.
BIN_COLORS = (
    *("#D55E00", "#E69F00", "#009E73", "#0072B2"),
    *("#CC79A7", "#56B4E9", "#999999", "#000000"),
)
RIGHT = BETTER = "#0072B2"
WRONG = WORSE = "#D55E00"
TRUTH = "#009E73"


def bin_color(i: int) -> str:
    return BIN_COLORS[i % len(BIN_COLORS)]
