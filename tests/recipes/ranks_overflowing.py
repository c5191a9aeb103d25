"""Run by test_precision.py on some ranks: an fp16 training whose loss scale begins too large.

    python ranks_overflowing.py EXPONENT RECIPE [OPTION …]

The scale begins at 2 to the EXPONENT.
"""

import sys

from convnext_yolo.launch.cli import main
from convnext_yolo.recipes import precision

if __name__ == "__main__":
    exponent, recipe, *options = sys.argv[1:]
    precision.START = 2.0 ** int(exponent)
    sys.exit(main(["train", "--config", recipe, *options]))
