"""The one exception that means: the user can mend this; and how words of strangers are shown in it."""


class UserError(ValueError):
    """Bad input. The message is one readable paragraph: the thing, its value, the limit, the way out.

    The command line prints the message alone and exits with status 2; a traceback appears only with --debug.
    """


def printable(text: object) -> str:
    """One line without control characters: names of files and answers of servers may hold any, also a terminal's."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))
