"""The family of errors that a user can act on.

Every message tells what was found, where (key, file:line, shard and member), what is allowed, and what to do.
"""


class TubeletError(Exception):
    """Base of every error raised for the user; the command line prints it without a traceback, exit code 1."""


class RecipeError(TubeletError):
    """The recipe or an override is wrong; `problems` lists everything found at once. Exit code 2."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(TubeletError):
    """Shards, an index or too many samples are unusable."""


class SampleError(TubeletError):
    """One sample can't be used; the stream replaces it. `reason` is a short, countable word such as "decode"."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}")


class StorageError(TubeletError):
    """A read or write on a file system or object store failed for good, after retries."""


class CheckpointError(TubeletError):
    """A checkpoint can't be written, verified or loaded."""


class WeightsError(TubeletError):
    """Imported weights don't fit the model; the message holds the report."""


class TrainingError(TubeletError):
    """The run can't go on, for example because the budget of skipped steps is spent."""
