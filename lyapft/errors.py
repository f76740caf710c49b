"""The one exception that means: the user's input is wrong, and the message says what to do."""


class InputError(ValueError):
    """Bad input. The message names what is wrong, where, what was given and what to do; it is shown without a traceback."""
