"""`python -m convnext_yolo.launch`: the command line, for launchers that start modules."""

import sys

from .cli import main

sys.exit(main())
