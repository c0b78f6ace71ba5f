"""What can go wrong in a way the user can mend, and the exit status it ends with."""

from __future__ import annotations

__all__ = ["EXIT_CANCELLED", "EXIT_FAILED", "EXIT_USAGE", "Cancelled", "LitappError"]

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_CANCELLED = 130


class LitappError(Exception):
    """A failure told in one line that says what to do about it.

    Args:
        message: the line shown to the user; newlines are folded into spaces.
        exit_code: ``EXIT_FAILED`` (1) when the work failed, ``EXIT_USAGE`` (2) when what was
            asked for cannot be done as asked.
    """

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


class Cancelled(Exception):
    """The user stopped the work; nothing was written."""
