"""The commands of the documentation and of ``--help``: where they stand, whether they could run.

A block of code says after its language what it needs that a test has not (``needs=lvis``), or in
which walk of ``test_docs.py`` it is run (``run=own``). One that says neither runs as it stands.
"""

import argparse
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import yaml
from detectron2.config import get_cfg

from bags_d2 import add_bags_config, cli
from bags_d2.analysis.method_runs import BASELINE, Comparison
from bags_d2.config import merge_config_file
from bags_d2.engine import setup_cfg

ROOT = Path(__file__).resolve().parents[1]
_, _, _LIST = (ROOT / "README.md").read_text().partition("## Documentation")
PAGES = [
    ROOT / "README.md",
    *(ROOT / page for page in dict.fromkeys(re.findall(r"\]\((docs/\w+\.md)\)", _LIST))),
    *(ROOT / name for name in ("CONTRIBUTING.md", "datasets/README.md")),
    *sorted((ROOT / "checkpoints").glob("*/README.md")),
]
_SUFFIXES = ("csv", "html", "jpg", "json", "pkl", "png", "pt", "pth", "py", "txt", "yaml")
# Arguments that name what a command writes.
_OUTPUTS = ("output", "file", "cache")


@dataclass(frozen=True)
class Block:
    """A block of code of a page, or the example of a command's help."""

    page: str
    language: str
    tag: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Commands of the shell, with continued lines joined and comments left out."""
        if self.language != "bash":
            return []
        lines = self.text.replace("\\\n", "").splitlines()
        lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
        return [" ".join(line.split()) for line in lines if line]


def blocks(page: Path) -> list[Block]:
    """All blocks of code of a page, in their order."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    name = str(page.relative_to(ROOT))
    return [Block(name, *info.partition(" ")[::2], text) for info, text in found]


def example(command: str) -> list[str]:
    """The commands below "Example:" of a command's help."""
    _, _, text = cli.build_parser(command).format_help().partition("Example:\n")
    return Block(command, "bash", "", text).commands


def inline_commands(page: Path) -> list[str]:
    """Commands within the text of a page, which may leave out what is required."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))
    return [span for span in spans if re.match(r"(bags-d2|make|python) ", span)]


class CommandError(AssertionError):
    """A command of the documentation that could not run."""


class _Parsed(Exception):
    """In place of running what was parsed."""

    def __init__(self, prog: str, args: argparse.Namespace) -> None:
        self.prog, self.parsed = prog, args


def check_command(command: str, there: set[str]) -> None:
    """Raise CommandError if a command could not run, in the present folder.

    Its program, flags, configs, methods and config keys must exist, and so must the files that it
    names, unless they lie below one of ``there``, to which the command adds what it writes.
    """
    command = re.sub(r"^for (\w+) in [^;]+; do (.*); done$", r"\2", command)
    command = re.sub(r"\\?\$\w+", "1", command)
    program, *words = shlex.split(command)
    if program.startswith("first="):  # of the script for Slurm
        return None
    if program == "srun":
        return check_command(words[-1], there)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        absent = [w for w in words if not re.search(rf"^{w}:", makefile, re.MULTILINE)]
        return _require(not absent, command, f"no target {absent}")
    if program in ("pip", "git", "source"):
        return _require_files([w for w in words if w.startswith("requirements")], command, there)
    if program in ("python", "torchrun"):
        words = words[words.index("-m") + 1 :] if "-m" in words else words
        if words[0] == "bags_d2":
            program = "bags-d2"
        elif words[0] == "pytest":
            return _require_files(words[1:], command, there)
        else:
            _require_files(words[:1], command, there)
            return _check_arguments(command, words, *_parse(command, words[0], words[1:]), there)
        words = words[1:]
    _require(program == "bags-d2", command, f"what is '{program}'?")
    if words[0].startswith("-"):
        return _require(words[0] in ("--help", "--version"), command, "no such flag")
    return _check_arguments(command, words[1:], *_parse(command, None, words), there)


def check_inline(command: str) -> None:
    """As :func:`check_command`, of a command that may leave out arguments."""
    program, *words = command.split()
    if program != "bags-d2":
        return check_command(command, {"muscima-pp"})
    if words and not words[0].startswith("-") and words[0] != "COMMAND":
        _require(words[0] in cli.COMMANDS, command, "no such command")
        known = re.findall(r"--[a-z-]+", cli.build_parser(words[0]).format_help())
        unknown = {word for word in words if word.startswith("--")} - set(known)
        _require(not unknown, command, f"no {unknown}")


def check_yaml(text: str, folder: Path) -> None:
    """Raise an error if a config has keys or a base that do not exist."""
    if isinstance(content := yaml.safe_load(text), dict):
        path = folder / "block.yaml"
        path.write_text(yaml.safe_dump(content))
        cfg = get_cfg()
        add_bags_config(cfg)
        merge_config_file(cfg, path)


def _parse(command: str, script: str | None, words: list[str]) -> tuple[str, argparse.Namespace]:
    """The program's name and arguments, by its own parser: of a script, or of bags-d2."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, args=None, namespace=None):
        parsed = parse(parser, args, namespace)
        if parser.prog == "bags-d2 prepare":  # whose script has a parser of its own
            return parsed
        raise _Parsed(parser.prog, parsed)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_only),
        mock.patch.object(sys, "argv", [script, *words]),
        mock.patch.object(sys, "path", [str(Path(script or ".").parent), *sys.path]),
    ):
        try:
            if script:
                runpy.run_path(script, run_name="__main__")
            else:
                cli.main(words)
        except _Parsed as found:
            return found.prog, found.parsed
        except SystemExit as ended:
            raise CommandError(f"{command}: refused ({ended.code})") from None
    raise CommandError(f"{command}: parses no arguments")


def _check_arguments(
    command: str, words: list[str], prog: str, args: argparse.Namespace, there: set[str]
) -> None:
    config, opts = getattr(args, "config_file", None), getattr(args, "opts", [])
    own = {str(getattr(args, name)) for name in _OUTPUTS if getattr(args, name, None)}
    own |= {opts[i + 1] for i, key in enumerate(opts) if key == "OUTPUT_DIR"}
    if prog == "bags-d2 compare":
        comparison = Comparison(Path(config), args.output, opts)
        for name in comparison.choose(args.methods) if args.methods else ():
            comparison.run(name, seed=1)
    elif config and str(config).endswith(".yaml"):
        runs = getattr(args, "run", [(getattr(args, "method", None), None, None)])
        for method, _, folder in runs:
            method = None if method == BASELINE else method
            named = argparse.Namespace(config_file=str(config), method=method, opts=opts)
            own.add(folder or setup_cfg(named).OUTPUT_DIR)
    _require_files([w for w in words if w != str(config)], command, there | own)
    there |= own


def _require_files(words: list[str], command: str, there: set[str]) -> None:
    """The words that look like files must be there."""
    for word in words:
        path = word.partition("=")[2] if re.match(r"[\w ]+=", word) else word
        is_path = "/" in path or path.rpartition(".")[2] in _SUFFIXES
        if not is_path or "://" in path or "=" in path or path[0] in "([":
            continue
        found = Path(path).exists() or any(Path(path).is_relative_to(known) for known in there)
        _require(found, command, f"where does '{path}' come from?")


def _require(condition: bool, command: str, what: str) -> None:
    if not condition:
        raise CommandError(f"{command}: {what}")
