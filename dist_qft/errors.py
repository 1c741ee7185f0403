"""Every way a run can end badly, with the exit code the shell sees.

The code tells a launcher how to go on: 2, 5 and 6 must not be retried, 4 may be, 75 must be. A
message is one or two lines: the place (file and line, or config key), the given value, the allowed values.
"""


class DistQFTError(Exception):
    """Base of all expected failures; anything else is a bug of ours and exits with 1.

    Attributes:
        exit_code: of the process, as the shell sees it.
        everywhere: every rank raises this error at the same point, so one of them prints it.
        rank_prefix: "rank N" on an error that this rank alone met after the ranks had connected.
        after_signal: a signal had asked this process to stop before the error was raised.
    """

    exit_code = 1
    everywhere = False
    rank_prefix: str | None = None
    after_signal = False


class UserError(DistQFTError):
    """The user's mistake: config, data, command line, or parts that do not belong together."""

    exit_code = 2


class SetupError(DistQFTError):
    """The machine or the launcher: no space, no device, no rendezvous, an unwritable folder."""

    exit_code = 3


class OutOfMemoryError(SetupError):
    """An allocation of this rank failed, on its GPU or in main memory."""


class PeerLostError(DistQFTError):
    """Another rank died or a collective timed out; the run may be retried."""

    exit_code = 4


class CorruptFileError(DistQFTError):
    """A file is torn, altered or hostile: its content differs from its manifest or its format."""

    exit_code = 5


class NumericError(DistQFTError):
    """A non-finite gradient, or replicas of the trainables that differ."""

    exit_code = 6
    everywhere = True  # decided from reduced numbers, which are equal on all ranks


class Preempted(DistQFTError):
    """A signal asked the run to stop; its state is saved and it wants to be requeued."""

    exit_code = 75
    everywhere = True
