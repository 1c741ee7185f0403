"""Calls that may never return, such as questions to a store behind a cut link: asked in a thread, given up in time."""

from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")


class NoAnswerError(Exception):
    """A call has not returned in time; its thread goes on waiting.

    Attributes:
        answered: is set when the call returns after all.
    """

    def __init__(self, answered: Event) -> None:
        super().__init__("no answer")
        self.answered = answered


def answer_within(seconds: float, ask: Callable[[], T]) -> T:
    """The result of `ask`, called in another thread.

    Raises:
        NoAnswerError: it has not returned after `seconds`.
        Exception: whatever `ask` raises.
    """
    answered = Event()
    answers: SimpleQueue[tuple[T, None] | tuple[None, Exception]] = SimpleQueue()

    def call() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))
        answered.set()

    Thread(target=call, name="patience", daemon=True).start()
    try:
        result, error = answers.get(timeout=seconds)
    except Empty:
        raise NoAnswerError(answered) from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # without an error it is a T
