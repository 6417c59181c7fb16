"""`python -m zerostack`: the same as the `zerostack` command."""

import sys

from .cli import main

sys.exit(main())
