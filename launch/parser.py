"""What all commands share: a parser that answers a mistake in one sentence."""

import argparse
from typing import TYPE_CHECKING, NoReturn


class Parser(argparse.ArgumentParser):
    """Says a mistake in one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with the sentence."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Parser]
else:  # not subscriptable before Python 3.14
    Commands = argparse._SubParsersAction


def add_command(commands: Commands, name: str, text: str, epilog: str = "") -> Parser:
    """Adds a command; `set_defaults(run_command=…)` says what it does."""
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser, takes_recipe_keys=False, is_run_by_ranks=False)
    return parser


def positive(text: str) -> int:
    """The type of an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def port(text: str) -> int:
    """The type of an option that is a TCP port."""
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 1 to 65535")
    return int(text)


def whole_number(text: str) -> int:
    """The type of an option that may be none at all."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)
