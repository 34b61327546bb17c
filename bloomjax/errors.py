"""The one exception that means "the input is wrong, not the program"."""


class BadInput(ValueError):
    """Something the user gave cannot be used; the message is one line that says what, where, and what exists.

    The verbs print it without a traceback and exit with 1.
    """
