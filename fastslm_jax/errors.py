"""What a user can mend: one line that says what, where and how; commands print it and exit with code 2."""


class UserError(ValueError):
    """Base of every error whose cause is a file, config, checkpoint, shape or device count that the user gave."""
