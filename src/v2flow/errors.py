"""The one error type that a user's mistake ends in."""


class V2FlowError(ValueError):
    """A mistake in the input: one line that names what was wrong, what was expected and the next step.

    The command line prints the message without a traceback and exits with status 2.
    """


def missing(package: str | None, extra: str) -> str:
    """The end of a line about a package that is not installed: which, and how a clone of v2flow gets it.

    Args:
        package: its name.
        extra: the extra of `setup.cfg` that it belongs to; "" for a package that v2flow always needs.
    """
    what = f".[{extra}]" if extra else "."
    return f'needs the package {package}, which is not installed; in the clone of v2flow run: pip install -e "{what}"'


def first_line(error: BaseException) -> str:
    """What another library's error says, on one line; its type where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
