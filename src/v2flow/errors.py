"""The one error type that a user's mistake ends in."""


class V2FlowError(ValueError):
    """A mistake in the input: one line that names what was wrong, what was expected and the next step.

    The command line prints the message without a traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """What another library's error says, on one line; its type where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
