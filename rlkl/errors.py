"""The one exception a user is meant to see: it is printed as a single line, without a traceback, and exits with 2."""


class UserError(Exception):
    """A mistake in a config, a file or a plug-in. The message names the key, the value and the valid choices."""
