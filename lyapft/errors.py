"""The one exception that means: the user's input is wrong, and the message says what to do."""


class InputError(ValueError):
    """Bad input: the message names what is wrong, where, what was given and what to do; shown without a traceback."""
