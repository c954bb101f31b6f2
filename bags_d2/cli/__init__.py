"""The command line: ``bags-d2 COMMAND``, a module of this package for each command.

A module says in its docstring what the command does (the first line, which ``bags-d2 --help``
shows, then more if needed, and an example), and has two functions: ``add_arguments(parser)`` and
``run(args)``. It imports what is heavy in ``run`` alone, so that ``--help`` is instant. It may say
in ``INTERRUPTED`` how to go on after Ctrl-C. A new module needs its row in ``COMMANDS`` below.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from ..errors import exit_on_user_error
from ..utils.quiet import silence_dependencies

__all__ = ["COMMANDS", "build_parser", "main", "parse_args"]

# The group of each command; its module is named likewise.
COMMANDS = {
    "prepare": "Data",
    "convert-data": "Data",
    "groups": "Data",
    "propose-groups": "Data",
    "exposure": "Data",
    "auto": "Training",
    "train": "Training",
    "fit": "Training",
    "calibrate": "Training",
    "add-class": "Training",
    "draw": "Detecting",
    "predict": "Detecting",
    "thresholds": "Detecting",
    "export": "Detecting",
    "evaluate": "Evaluation",
    "compare": "Evaluation",
    "runs": "Evaluation",
    "report": "Evaluation",
    "analyze": "Evaluation",
    "convert": "Checkpoints",
    "publish": "Checkpoints",
    "demo": "First steps",
}


def parse_args(argv: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The module of a command and its arguments; ends the process as argparse does."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(_overview(), end="")
        raise SystemExit(0)
    if name == "--version":
        from .. import __version__

        print(f"bags-d2 {__version__}")
        raise SystemExit(0)
    if name not in _commands():
        print(f"Error: There is no command '{name}'; bags-d2 --help lists all.", file=sys.stderr)
        raise SystemExit(2)
    return _module(name), build_parser(name).parse_args(argv[1:])


def build_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    module = _module(name)
    about, _, more = module.__doc__.partition("\n")
    description, _, example = more.partition("Example:")
    parser = _Parser(
        prog=f"bags-d2 {name}",
        description=f"{about}\n{description.rstrip()}",
        epilog=f"Example:{example.rstrip()}" if example else None,
        formatter_class=_HelpFormatter,
    )
    module.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command (None: that of ``sys.argv``).

    Errors that a user can fix, and Ctrl-C, end the process with one sentence.
    """
    silence_dependencies()
    module, args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        with exit_on_user_error():
            module.run(args)
    except KeyboardInterrupt:
        how = getattr(module, "INTERRUPTED", "Run the same command again to start over.")
        print(f"\nInterrupted. {how}", file=sys.stderr)
        raise SystemExit(130) from None


class _Parser(argparse.ArgumentParser):
    """Ends with one sentence, as all errors do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"Error: {message}; see '{self.prog} --help'.\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of docstrings, and adds the default to the help of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        # Of switches and of what has none, no default is to be shown.
        shown = action.default not in (None, [], "", argparse.SUPPRESS) and action.nargs != 0
        return f"{text} (default: %(default)s)" if shown and "default" not in text else text


def _commands() -> list[str]:
    return [name for name in COMMANDS if importlib.util.find_spec(_module_name(name))]


def _module_name(command: str) -> str:
    return f"{__name__}.{command.replace('-', '_')}"


def _module(command: str) -> ModuleType:
    return importlib.import_module(_module_name(command))


def _overview() -> str:
    lines = ["usage: bags-d2 COMMAND [flags]", "", "Long-tailed object detection on Detectron2."]
    group = None
    for name in _commands():
        if COMMANDS[name] != group:
            group = COMMANDS[name]
            lines += ["", f"{group}:"]
        about = _module(name).__doc__.partition("\n")[0].rstrip(".")
        lines.append(f"  {name:<16}{about}")
    return "\n".join([*lines, "", "'bags-d2 COMMAND --help' shows the flags of a command.", ""])
