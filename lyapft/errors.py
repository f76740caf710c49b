"""The one exception that means: the user's input is wrong, and the message says what to do."""

from lyapft import secrets

NOT_JSON = (ValueError, RecursionError)  # of json.loads: no JSON, no UTF-8, nested too deep


class InputError(ValueError):
    """Bad input: the message names what is wrong, where, what was given and what to do; shown without a traceback.

    Credentials in it are hidden: it may quote a library, and reaches logs and records.
    """

    def __init__(self, message: str) -> None:
        super().__init__(secrets.hidden(message))


def behind(error: BaseException | None) -> InputError | None:
    """The wrong input behind an exception that Hydra wrapped around it, however deep; None for another fault."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error
