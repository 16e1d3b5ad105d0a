"""``python -m pyprune`` is the command ``pyprune``."""

import sys

from pyprune_command.main import main

if __name__ == "__main__":
    sys.exit(main())
