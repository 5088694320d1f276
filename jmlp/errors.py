"""The errors a user can meet, and the exit code each one ends in.

Every message names the key or file, the value found, what was expected and a
way out, in one line or one line a mistake. The command line prints it without
a traceback; Python callers catch `JmlpError`.
"""


class JmlpError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1
    everywhere = False
    """whether every process of the job raises it, so that one need say it"""


class ConfigError(JmlpError, ValueError):
    """A config key, a command line flag or an argument is wrong."""

    exit_code = 2


class DataError(JmlpError, ValueError):
    """A data file or array cannot be used: names the file, row and column."""

    exit_code = 2


class RunDirError(JmlpError):
    """A run directory is in use, belongs to another config or holds no run."""

    exit_code = 2


class TrainingError(JmlpError):
    """The run itself failed; the message names the last good checkpoint."""


class CheckpointError(JmlpError):
    """No checkpoint in the directory can be restored; the message lists why."""


class MismatchError(CheckpointError):
    """A checkpoint is whole, but of another model, optimizer or kind of random key."""

    exit_code = 2


class GoneError(CheckpointError):
    """A checkpoint was deleted by the run's writer while it was read: there are newer ones."""


class ExportError(JmlpError):
    """A model in another format does not predict what the run predicts; nothing was written."""


class ClusterError(JmlpError):
    """The other processes of a job could not be joined."""


class PeerLost(JmlpError):
    """Another process of the job has ended or stopped answering; this one ends too."""

    exit_code = 3
