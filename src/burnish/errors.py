"""The error for everything a user can mend."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to mend it.

    The command line prints it without a traceback and exits with 2; nothing is left half-written.
    """
