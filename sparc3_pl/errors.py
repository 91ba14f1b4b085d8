"""The one exception that means: the user's input is wrong."""

__all__ = ["InputError"]


class InputError(ValueError):
    """An error that the user can cause and mend.

    The message is one line that names what is wrong, which value, and the way out. The command line prints it
    without a traceback and exits with code 2. Our own mistakes are ``assert``ed instead.
    """
