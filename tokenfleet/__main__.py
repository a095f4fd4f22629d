"""``python -m tokenfleet``: the command line."""

import sys

from tokenfleet.cli import main

sys.exit(main())
