"""``python -m sparc3_pl.cli``."""

import sys

from sparc3_pl.cli.main import main

sys.exit(main())
