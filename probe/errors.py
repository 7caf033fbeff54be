"""What can go wrong that a user can mend, and the one table of exit codes.

| code | meaning | raised as |
|---|---|---|
| 0 | done | |
| 1 | a fault of the program itself (a traceback is shown) | |
| 2 | usage: an option, or a combination of options, that makes no sense | `ConfigError` |
| 3 | input: images, labels, manifests or checkpoints that cannot be used | `InputError` |
| 4 | finished, but more images failed than allowed | `FailedImagesError` |
| 5 | mismatch: a cache, run or backbone that is not the one asked for | `MismatchError` |
| 6 | a file of ours is damaged or missing | `CorruptError` |
| 7 | the disk is full, read-only or failing | `StorageError` |
| 8 | the numbers broke down: a non-finite loss, an optimum that does not exist | `NumericalError` |
| 9 | the device ran out of memory | `OutOfMemoryError` |
| 10 | a worker or process of a cluster failed more often than allowed | `EngineError` |
| 130, 141, 143 | ended by Ctrl-C, a closed pipe or SIGTERM; what is in a cache or checkpoint is kept | `Interrupted` |

A message says what was wrong, where, and what to do about it.
"""


class ProbeError(Exception):
    """Something the user can mend. The command line prints its message alone, without a traceback."""

    exit_code = 1


class ConfigError(ProbeError):
    """An option, or a combination of options, that makes no sense."""

    exit_code = 2


class InputError(ProbeError):
    """Images, labels, manifests or checkpoints that cannot be used."""

    exit_code = 3


class FailedImagesError(ProbeError):
    """More images could not be read than the user allows."""

    exit_code = 4


class MismatchError(ProbeError):
    """A cache, a run or a backbone that is not the one asked for."""

    exit_code = 5


class CorruptError(ProbeError):
    """A file that this program wrote is damaged or missing."""

    exit_code = 6


class StorageError(ProbeError):
    """The disk is full, read-only or failing."""

    exit_code = 7


class NumericalError(ProbeError):
    """The numbers broke down: a non-finite loss, or an optimum that does not exist."""

    exit_code = 8


class OutOfMemoryError(ProbeError):
    """The device ran out of memory."""

    exit_code = 9


class EngineError(ProbeError):
    """A worker or process of a cluster failed more often than allowed, or cannot be had at all."""

    exit_code = 10
