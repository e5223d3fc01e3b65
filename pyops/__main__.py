"""Entry of `python -m pyops`."""

import sys

from pyops.cli import main

if __name__ == "__main__":
    sys.exit(main())
