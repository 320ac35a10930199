"""`python -m vitrail` is the command `vitrail`."""

import sys

from vitrail.cli import main

sys.exit(main())
