"""`python -m lightspan` is the `lightspan` command."""

import sys

from lightspan.cli import main

sys.exit(main())
