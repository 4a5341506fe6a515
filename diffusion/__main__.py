"""The command line: `python -m diffusion`. Needs the extra `diffusion`."""

import sys
from collections.abc import Sequence

from hopjax.__main__ import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run("diffusion.cli.app", "diffusion", arguments)


if __name__ == "__main__":
    sys.exit(main())
