"""`fusion`, or `python -m fusion`: see `fusion.cli.main`."""

import sys

from fusion.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
