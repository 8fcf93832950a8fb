"""`python -m dyhead`, the same as the console script `dyhead`."""

import sys

from dyhead.cli import main

if __name__ == "__main__":
    sys.exit(main())
