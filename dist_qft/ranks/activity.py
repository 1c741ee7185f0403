"""The present activity of this rank, such as "step 12", for heartbeats, crash reports and messages about lost peers."""

from collections.abc import Callable


class Activity:
    """The present activity; calling it returns the words.

    Args:
        text: the first activity.
    """

    def __init__(self, text: str = "start-up") -> None:
        self._read: Callable[[], str] = lambda: text

    def __call__(self) -> str:
        return self._read()

    def follow(self, read: Callable[[], str]) -> None:
        """Take the activity from `read()` from now on. Other threads call it, so it must be quick and take no lock."""
        self._read = read
