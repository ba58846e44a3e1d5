"""The errors for everything a user can mend."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to mend it.

    The command line prints it without a traceback and exits with 2; nothing is left half-written.
    """


class RewardError(UserError):
    """A reward that gives no usable answer: what was learnt before is not touched by it, and can be saved."""


def described(error: BaseException) -> str:
    """Type and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
