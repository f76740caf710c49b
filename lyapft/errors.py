"""The one exception that means: the user's input is wrong, and the message says what to do."""

NOT_JSON = (ValueError, RecursionError)  # of json.loads: no JSON, no UTF-8, nested too deep


class InputError(ValueError):
    """Bad input: the message names what is wrong, where, what was given and what to do; shown without a traceback."""


def behind(error: BaseException | None) -> InputError | None:
    """The wrong input behind an exception that Hydra wrapped around it, however deep; None for another fault."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error
