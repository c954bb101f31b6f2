"""Write a detector as TorchScript or ONNX.

Each file is compared with the detector on the given images, which must show something to detect:
boxes within 0.01 pixels, scores and
masks within 0.0001. Beside the files, model.json says how images are to be prepared and what the
classes are called (docs/deployment.md).

Example:
    bags-d2 export --config-file glyphs_bags.yaml --input photos --output output/exported
"""

import argparse
from pathlib import Path

from .flags import add_config_flags, add_input_flag, add_options_flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_flags(parser)
    add_input_flag(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder of the files")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=("onnx", "torchscript"),
        default=["onnx", "torchscript"],
        help="what to write",
    )
    add_options_flag(parser)


def run(args: argparse.Namespace) -> None:
    from ..analysis.media import image_paths
    from ..engine import LongTailPredictor
    from ..engine.export import export_predictor

    images = image_paths(args.input)
    predictor = LongTailPredictor.from_config_file(
        args.config_file, opts=args.opts, device="cpu", method=args.method
    )
    print(export_predictor(predictor, images, args.output, args.formats))
