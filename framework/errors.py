"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """Bad input. The message is one readable paragraph: the thing, its value, the limit, the way out.

    The command line prints the message alone and exits with status 2; a traceback appears only with --debug.
    """
