"""`python -m lorascope` is the command `lorascope`."""

import sys

from lorascope.cli import main

sys.exit(main())
