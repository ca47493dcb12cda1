"""`python -m v2flow` and the console script `v2flow`."""

import sys

from v2flow.cli import main

if __name__ == "__main__":
    sys.exit(main())
