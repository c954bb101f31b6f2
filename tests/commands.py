"""Commands of bags-d2 in this process, with errors as exceptions or as a user sees them, and as a
user's own process."""

import contextlib
import io
import subprocess
import sys

from bags_d2 import cli


def run_command(*arguments):
    module, args = cli.parse_args([str(argument) for argument in arguments])
    return module.run(args)


def bags_d2(*arguments, **options):
    command = [sys.executable, "-m", "bags_d2", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def bags_d2_here(*arguments):
    """What :func:`bags_d2` returns, without a new interpreter, whose imports take seconds."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            cli.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as ended:
            code = ended.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
    texts = [stream.buffer.getvalue().decode() for stream in streams]
    return subprocess.CompletedProcess(arguments, code, *texts)
