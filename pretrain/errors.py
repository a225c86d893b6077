"""The family of errors that a user can act on.

Every message tells what was found, where (key, file:line, shard and member), what is allowed, and what to do.
"""


class TubeletError(Exception):
    """Base of every error raised for the user; the command line prints it without a traceback, exit code 1."""


class RecipeError(TubeletError):
    """Error of a wrong recipe, override or option; `problems` lists everything found at once. Exit code 2."""

    def __init__(self, problems: str | list[str]) -> None:
        # A list, so that what several checks find can be gathered and told at once.
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(TubeletError):
    """Error of shards, an index or too many samples that are unusable."""


class SampleError(TubeletError):
    """Error of one sample; the stream replaces it. `reason` is a short, countable word such as "decode"."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # An exception is pickled with its message as the only argument: in another process it would be a TypeError.
        return type(self), (self.reason, self.detail)


class StorageError(TubeletError):
    """Error of a read or write on a file system or object store that failed for good, after retries."""


class CheckpointError(TubeletError):
    """Error of a checkpoint that can't be written, verified or loaded."""


class WeightsError(TubeletError):
    """Error of imported weights that don't fit the model; the message holds the report."""


class TrainingError(TubeletError):
    """Error of a run that can't go on, for example because the budget of skipped steps is spent."""
