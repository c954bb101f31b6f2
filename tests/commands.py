"""Commands of bags-d2 in this process, with errors as exceptions, and as a user's own process."""

import subprocess
import sys

from bags_d2 import cli


def run_command(*arguments):
    module, args = cli.parse_args([str(argument) for argument in arguments])
    return module.run(args)


def bags_d2(*arguments, **options):
    command = [sys.executable, "-m", "bags_d2", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)
