"""What ends a run that is no mistake of the program: wrong input, a process that is lost."""

EXIT_RESTART = 75  # EX_TEMPFAIL: the launcher may start the same command again


class BadInput(ValueError):
    """Something the user gave cannot be used; the message is one line that says what, where, and what exists.

    The verbs print it without a traceback and exit with 1.
    """


class Restart(RuntimeError):
    """This process cannot go on, but another start of the command may; the verbs print one line and exit with 75."""


class Unreachable(Restart):
    """Another process of the job does not answer."""


class NoRoom(OSError):
    """A checkpoint could not be saved because the disk is full; the message is one line that says where, how much."""
