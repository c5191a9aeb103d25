"""The exceptions of this room, all meant for the user's eyes."""


class DataError(Exception):
    """A user's mistake in data: the text is one sentence naming file, field, value and mend.

    The command line prints the text alone and exits with `exit_code`.
    """

    exit_code = 2
    on_one_rank = False  # others know nothing of it: this one must speak


class AwayError(DataError):
    """A server stayed away too long. It may be back later: a job may be started again."""

    exit_code = 1


class CorruptSampleError(DataError):
    """One sample can't be used; training replaces it and goes on (see `quarantine`).

    Args:
        shard: name of its tar, or of its file.
        key: of the sample.
        reason: what is wrong, in a few words.
    """

    def __init__(self, shard: str, key: str, reason: str):
        super().__init__(
            f"{shard}: sample {key} {reason}; `convnext-yolo verify --images` finds all such, "
            "then fetch or make the shard again"
        )
        self.shard, self.key, self.reason = shard, key, reason


class RefusedError(DataError):
    """One image or annotation can't be used; unless told to be strict, `shard` leaves it out.

    Args:
        kind: of `findings.KINDS`.
        sentence: names file, field, value and mend.
    """

    def __init__(self, kind: str, sentence: str):
        super().__init__(sentence)
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # travels from worker processes
        return type(self), (self.kind, str(self))
