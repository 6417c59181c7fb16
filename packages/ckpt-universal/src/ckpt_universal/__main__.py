"""`python -m ckpt_universal`."""

import sys

from .cli import main

sys.exit(main())
