"""`python -m vitft X ...` is `vitft X ...`, for whoever has not the script on the path."""

import sys

from vitft.cli import main

sys.exit(main())
