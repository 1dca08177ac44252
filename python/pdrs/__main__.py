"""``python -m pdrs``: look into checkpoints, convert them, verify them."""

import sys

from pdrs._cli import main

if __name__ == "__main__":
    sys.exit(main())
