"""`python -m convnext_yolo.launch`: the command line, for launchers that start modules."""

import os
import sys

from .supervision.lifeline import FRONT

if FRONT in os.environ:  # a rank of a supervised job
    from .supervision.guard import main as guarded

    sys.exit(guarded(sys.argv[1:]))

from .cli import main

sys.exit(main())
