"""`python -m toca_fx`: the same as the `toca-fx` command."""

from __future__ import annotations

import sys

from toca_fx.cli import main

if __name__ == "__main__":
    sys.exit(main())
