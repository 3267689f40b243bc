"""`python -m talos.app.cli`, where the script `talos` is not on the path."""

import sys

from talos.app.cli.app import main

sys.exit(main())
