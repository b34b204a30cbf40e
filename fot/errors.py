"""The errors a user can cause; each prints as one line and ends the command with exit code 2."""


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and the remedy."""


class ConfigError(UserError):
    """A config field that is unknown, of the wrong type, or inconsistent with another one."""


class DataError(UserError):
    """Documents or a tokenizer that can't be read or don't fit the model."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, or belongs to another config."""


class TrainingError(UserError):
    """A run that can't go on, such as one whose gradients stay non-finite."""


class ConversionError(UserError):
    """A checkpoint of another program that can't be read, or a model that can't be expressed in the other format."""


class LostError(UserError):
    """Another process of the run is gone, or does not answer; the same command goes on from the newest checkpoint."""
