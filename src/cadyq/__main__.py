"""``python -m cadyq``."""

import sys

from cadyq.cli import main

sys.exit(main())
