"""`python -m talos`: the command line."""

import sys

from talos.cli import main

if __name__ == "__main__":
    sys.exit(main())
