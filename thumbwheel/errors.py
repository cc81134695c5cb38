"""What went wrong, in words for a person."""


class ThumbwheelError(Exception):
    """An error that its message explains: what happened, what it means and what to do next.

    The command line prints the message alone and exits with `exit_code`.
    """

    exit_code = 1


class SettingsError(ThumbwheelError):
    """A setting is missing, unknown or out of range."""

    exit_code = 2


class LogError(ThumbwheelError):
    """The event log could not be opened, read or written."""

    exit_code = 3


class AdapterError(ThumbwheelError):
    """An adapter is missing, incomplete, altered or of a kind that is not served."""

    exit_code = 4


class RolloutError(ThumbwheelError):
    """A decision does not fit the state of the rollout (unknown version, wrong digest, failed gates)."""

    exit_code = 5
