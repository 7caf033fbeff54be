"""`python -m probe`: the command line, where the folder of the command `probe` is not on the path."""

import sys

from probe.cli import main

if __name__ == "__main__":
    sys.exit(main())
