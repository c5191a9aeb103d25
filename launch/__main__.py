"""`python -m convnext_yolo.launch`: the command line, for launchers that start modules."""

import os
import sys

from .supervision.lifeline import FRONT

if FRONT in os.environ:  # a rank of a supervised job
    from .supervision.guard import main as guarded

    sys.exit(guarded(sys.argv[1:]))

from .cli import main

code = main()
if code and "RANK" in os.environ:
    # A rank with a mistake is still in its group, whose threads may not outlive an orderly end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
