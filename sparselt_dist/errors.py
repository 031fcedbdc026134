"""The errors a user can mend. Each carries one message; every command turns it into exit code 2.

A message says what was found, where, what was expected and what to do. Passwords and tokens of the addresses in it are
left out here, wherever it was made, for it goes to terminals, logs and MLflow.
"""

from sparselt_dist.redaction import scrubbed


class SparseltError(Exception):
    """Base of all errors that a user can mend; `str(error)` is shown without a traceback."""

    silent = False
    """Another rank says it."""

    def __init__(self, message: str) -> None:
        super().__init__(scrubbed(message))


class ConfigError(SparseltError):
    """A configuration, flag or profile is wrong; all faults found are in the one message."""


class DataError(SparseltError):
    """A text source, shard, manifest or tokenizer is wrong."""


class CheckpointError(SparseltError):
    """A checkpoint cannot be used, or a run folder cannot be written."""


class PluginError(SparseltError):
    """An objective plug-in cannot be found, imported or used."""


class RunFailureError(RuntimeError):
    """A run that cannot go on, for a reason that no configuration mends; one message, no traceback, exit code 1."""

    silent = False
    """Another rank says it."""

    def __init__(self, message: str) -> None:
        super().__init__(scrubbed(message))
