"""`python -m lightspan` is the `lightspan` command."""

import sys

from lightspan.cli.main import main

sys.exit(main())
