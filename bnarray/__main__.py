"""The command line, as ``python -m bnarray``."""

import sys

from bnarray.cli import main

if __name__ == "__main__":
    sys.exit(main())
