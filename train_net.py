#!/usr/bin/env python
"""Train or evaluate a detector; the same as ``bags-d2 train``."""

import sys

from bags_d2.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
