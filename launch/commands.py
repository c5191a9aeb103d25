"""The commands and their options.

A command imports its room only when it runs, so that `--help` answers at once.
"""

import argparse

from . import (
    bench_commands,
    data_commands,
    doctor_commands,
    plan_commands,
    run_commands,
    weights_commands,
)
from .parser import Parser


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        "convnext-yolo",
        description="Train YOLO detectors with ConvNeXt backbones, on one machine or a cluster.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (
        data_commands,
        plan_commands,
        doctor_commands,
        run_commands,
        weights_commands,
        bench_commands,
    ):
        for add in module.COMMANDS:
            add(commands)
    return parser
