"""Flags that several commands share, named as in Detectron2."""

import argparse

__all__ = [
    "METHOD_HELP",
    "add_cache_flags",
    "add_config_flags",
    "add_data_flags",
    "add_input_flag",
    "add_launch_flags",
    "add_options_flag",
    "add_run_flags",
    "add_thresholds_flag",
    "add_trailing_options",
]


METHOD_HELP = (
    "what to lay over the config: a name in configs/methods or configs/ablations, NAME_classifier "
    "to train its classifier alone, or the path of a YAML"
)


def add_config_flags(
    parser: argparse.ArgumentParser, help: str = "a path, or a name in this package's configs"
) -> None:
    """``--config-file``, which is required, and ``--method``."""
    parser.add_argument("--config-file", required=True, metavar="FILE", help=help)
    parser.add_argument("--method", metavar="NAME", help=METHOD_HELP)


def add_data_flags(parser: argparse.ArgumentParser, use: str = "") -> None:
    """``DATA``, which ``data.formats.find_dataset`` reads, or ``--row`` in its place."""
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="folder of a data set in COCO, LVIS, YOLO, Pascal VOC or LabelMe format, or its "
        "data.yaml or JSON file",
    )
    parser.add_argument(
        "--row",
        nargs=4,
        action="append",
        default=[],
        metavar=("NAME", "KIND", "ANNOTATIONS", "IMAGES"),
        help=f"a data set as in DATASETS.REGISTER, in place of a folder; may be repeated{use}",
    )


def add_cache_flags(
    parser: argparse.ArgumentParser, use: str = "default: those that fit takes"
) -> None:
    """``--cache`` and ``--detector``: box features of the training images."""
    help = f"box features of the training images, made if they do not exist; {use}"
    parser.add_argument("--cache", metavar="FOLDER", help=help)
    parser.add_argument(
        "--detector",
        metavar="FILE",
        help="checkpoint that the features are of, such as stage 1; default: MODEL.WEIGHTS",
    )


def add_trailing_options(parser: argparse.ArgumentParser) -> None:
    """``KEY VALUE`` pairs at the end of the line, which take precedence over the config file."""
    help = "config keys and values, last on the line (docs/config.md)"
    parser.add_argument("opts", nargs="...", default=[], metavar="KEY VALUE", help=help)


def add_options_flag(parser: argparse.ArgumentParser) -> None:
    """``--opts``, in place of :func:`add_trailing_options` beside arguments of any number."""
    help = "config keys and values, last on the line (docs/config.md)"
    parser.add_argument("--opts", nargs="...", default=[], metavar="KEY VALUE", help=help)


def add_input_flag(parser: argparse._ActionsContainer, required: bool = True) -> None:
    """``--input``, what ``analysis.media.image_paths`` reads."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=required,
        metavar="PATH",
        help="images, folders of images, glob patterns, or text files (.txt) of a path a line",
    )


def add_thresholds_flag(parser: argparse.ArgumentParser) -> None:
    """``--thresholds``, the choice of ``ScoreThresholds.of_checkpoint``."""
    parser.add_argument(
        "--thresholds",
        metavar="FILE",
        help="of the classes' scores, or 'none'; default: those that 'bags-d2 thresholds' has left "
        "beside the checkpoint, if any",
    )


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """How many processes, and on which machines; torchrun's own settings take precedence."""
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs of each machine; 0: the CPU")
    parser.add_argument("--num-machines", type=int, default=1, help="machines in all")
    parser.add_argument("--machine-rank", type=int, default=0, help="this machine's number, from 0")
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where processes meet, tcp://HOST:PORT of machine 0; auto: a free port of this one",
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Which evaluated runs to read, and how."""
    parser.add_argument("--dataset", help="which, if several were evaluated")
    parser.add_argument("--task", choices=("bbox", "segm"), default="bbox", help="boxes or masks")
    parser.add_argument(
        "--thresholds", type=int, nargs="*", metavar="N", help="bin edges; default: the configs'"
    )
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="registers the data set; default: config.yaml of the first run",
    )
