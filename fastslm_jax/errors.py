"""Errors that the user can fix."""


class UserError(ValueError):
    """An error in a file, config, checkpoint, shape or device count that the user gave.

    The message is one line: what is wrong, where, and how to fix it. Commands print it and exit
    with code 2.
    """
