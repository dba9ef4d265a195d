"""The one exception of this package: a sentence for the user.

It knows nothing of command lines; `sphere.commands.common` turns it into an exit status.
"""


class SphereError(Exception):
    """Bad input or a state that cannot go on; the message says what, where and how to mend it."""
