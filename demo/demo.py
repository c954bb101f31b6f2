#!/usr/bin/env python
"""Draw what a model detects in images, a video or a webcam; the same as ``bags-d2 draw``."""

import sys

from bags_d2.cli import main

if __name__ == "__main__":
    main(["draw", *sys.argv[1:]])
