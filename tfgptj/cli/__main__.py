"""`python -m tfgptj.cli` is the `tfgptj` command."""

import sys

from tfgptj.cli import main

sys.exit(main())
