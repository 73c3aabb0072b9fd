"""The `toca-fx` command as a process, also as `python -m toca_fx`."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from toca_fx.cli import main


def run() -> NoReturn:
    """Run the command line and end the process with its exit status."""
    status = main()
    if "toca_fx.explain_command" in sys.modules:
        # To free all that imports and a trace have made takes two seconds, and changes nothing:
        # this command leaves no files and no processes. mypy ends in the same way.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
