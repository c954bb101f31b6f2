"""Build one of the built-in long-tailed data sets of drawn characters."""

import argparse
import logging

from bags_d2.data.glyphs import PRESETS, build_glyphs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", choices=list(PRESETS), help="which data set")
    parser.add_argument("--root", default="datasets", help="the set goes to ROOT/PRESET")
    parser.add_argument("--image-folder", help="photographs to take crops of as backgrounds")
    parser.add_argument("--seed", type=int, default=0, help="other pictures, other rare classes")
    parser.add_argument("--num-workers", type=int, help="default: one per processor")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        folder = build_glyphs(
            args.preset,
            args.root,
            image_folder=args.image_folder,
            seed=args.seed,
            num_workers=args.num_workers,
            progress=not args.quiet,
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    logging.info("%s is ready", folder)


if __name__ == "__main__":
    main()
