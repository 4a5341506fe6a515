"""The command line: `python -m hopjax`, or `hopjax` where the package is installed. Needs the extra `cli`."""

import io
import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # β and ε, whatever the locale
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        return _run(arguments)
    except KeyboardInterrupt as interruption:
        print(": ".join(("interrupted", *map(str, interruption.args))), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader had seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a disk that is full, say; finished blocks are kept
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 1


def _run(arguments: Sequence[str] | None) -> int:
    try:
        from cyclopts import CycloptsError

        from hopjax.cli.app import app
        from hopjax.cli.options import UsageError
    except ImportError as error:
        print(f"error: the command line needs {error.name}: pip install 'hopjax[cli]'", file=sys.stderr)
        return 2
    try:
        return app(arguments, exit_on_error=False, print_error=False, result_action="return_value") or 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
    except CycloptsError as error:
        print(f"error: {' '.join(str(error).split())} See --help.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
