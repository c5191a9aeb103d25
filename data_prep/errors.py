"""The one exception of this room that is meant for the user's eyes."""


class DataError(Exception):
    """A user's mistake in data: the text is one sentence naming file, field, value and mend.

    The command line prints the text alone and exits with `exit_code`.
    """

    exit_code = 2
