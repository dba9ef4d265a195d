"""The one exception of this package: a sentence for the user; and what other exceptions say, in it.

It knows nothing of command lines; `sphere.commands.common` turns it into an exit status and names the flags.
"""

from __future__ import annotations

from collections.abc import Sequence


class SphereError(Exception):
    """Bad input or a state that cannot go on; the message says what, where and how to fix it.

    Attributes:
        arguments: names of the settings or parameters to correct, e.g. ("beta_hse",), as functions and `RunConfig` call
            them. A command line adds how it spells them.
    """

    def __init__(self, message: str, *, argument: str | Sequence[str] = ()) -> None:
        super().__init__(message)
        self.arguments = (argument,) if isinstance(argument, str) else tuple(argument)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, to be part of a sentence; its kind where it says nothing.

    A heading, as torch puts one before what does not fit, is passed over where something follows it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if not line.endswith(":")), lines[0] if lines else type(error).__name__
    )
