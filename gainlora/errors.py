"""The one error a user is meant to read: what is wrong, the value received, and the remedy."""


class GainLoRAError(Exception):
    """Bad input or state, found before work is lost. The command line prints it without a traceback."""
