"""The command line: `python -m hopjax`, or `hopjax` where the package is installed. Needs the extra `cli`."""

import importlib
import io
import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run("hopjax.cli.app", "cli", arguments)


def run(module: str, extra: str, arguments: Sequence[str] | None = None) -> int:
    """Runs the command line that a module calls `app`, and whose packages an extra brings; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # β and ε, whatever the locale
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        return _run(module, extra, arguments)
    except KeyboardInterrupt as interruption:
        print(": ".join(("interrupted", *map(str, interruption.args))), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader had seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a disk that is full, say; finished blocks are kept
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 1


def _run(module: str, extra: str, arguments: Sequence[str] | None) -> int:
    try:
        from cyclopts import CycloptsError

        app = importlib.import_module(module).app
        from hopjax.cli.options import UsageError, as_options
    except ImportError as error:
        print(f"error: the command line needs {error.name}: pip install 'hopjax[{extra}]'", file=sys.stderr)
        return 2
    try:
        try:
            command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
        except ValueError as error:  # of settings that check themselves
            raise UsageError(as_options(str(error))) from error
        return command(*bound.args, **bound.kwargs) or 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
    except CycloptsError as error:
        print(f"error: {' '.join(str(error).split())} See --help.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
