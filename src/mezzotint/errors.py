"""The errors a user can cause. Each message is one line: what is wrong and what to do about it.

Knows nothing of what raises them; `cli` prints them and exits with status 2.
"""


class MezzotintError(Exception):
    """Base of every error that is the input's fault rather than the program's."""


class ConfigError(MezzotintError):
    """A setting is missing, unknown or out of range."""


class DataError(MezzotintError):
    """A corpus, shard or tokenizer cannot be used."""


class CheckpointError(MezzotintError):
    """A run folder or checkpoint cannot be used."""


class ArtifactError(MezzotintError):
    """A `.mzt` file is damaged, foreign, too new, or cannot be made to fit."""


class Interrupted(MezzotintError):
    """The run was asked to stop (SIGINT, SIGTERM); its checkpoint is written."""
