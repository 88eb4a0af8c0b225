"""The command line: parse, one call, print. Exit codes are those of `cadyq.errors`; 130 after Ctrl-C.

Every command is a module of its name with one function, ``add``, that adds its parser.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from cadyq import __version__
from cadyq.cli import (
    audit,
    bulk,
    calibrate,
    compare,
    download,
    evaluate,
    explain,
    export,
    info,
    profile,
    reproduce,
    serve,
    sweep,
    train,
    upscale,
    video,
)
from cadyq.cli.common import complain
from cadyq.errors import CadyqError

__all__ = ["main"]

COMMANDS = (
    upscale,
    bulk,
    video,
    serve,
    evaluate,
    audit,
    info,
    export,
    calibrate,
    download,
    train,
    profile,
    explain,
    compare,
    sweep,
    reproduce,
)
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; a user's mistake never ends in a traceback."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except CadyqError as error:
        complain(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("cadyq: interrupted; nothing half-written was left", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader (say, head) has seen enough; keep Python from complaining when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        complain(error)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cadyq",
        description="Image super-resolution that spends bits only where an image needs them.",
        epilog="Exit codes: 0 done, 1 audit failed or other error, 2 argument, 3 picture, 4 model file, "
        "5 data set, 6 unsupported, 7 missing extra, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"cadyq {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
