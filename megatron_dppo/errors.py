"""Every error that this package raises on purpose. A message names what is wrong and, where there is one, the remedy.

``ValueError`` means that something given is wrong, ``RuntimeError`` that something failed.
"""

from __future__ import annotations


class ConfigError(ValueError):
    """The configuration cannot work as given. The message names the field or key and what it may be."""


class BackendUnavailableError(ValueError):
    """A backend was asked for by name and cannot be used; the message says why."""


class MissingDependencyError(ImportError, ValueError):
    """What was asked for needs a package that is not installed; the message names the extra that brings it."""


class LossInputError(ValueError):
    """An input of the loss is wrong; the message names it, the position and what is wrong."""


class TaskError(ValueError):
    """A task cannot be built or read; the message names the task, the place and the remedy."""


class PromptTooLongError(TaskError):
    """A prompt has more tokens than is allowed; the message names the problem and both numbers."""


class InvalidSampleError(ValueError):
    """A sample breaks the contract; the message names the sample, the token and what is wrong with it."""


class ScoringError(RuntimeError):
    """No scoring worker can be started; the message has the worker's own reason."""


class RolloutError(RuntimeError):
    """The engine cannot go on: no server is left, a request kept failing, or a timeout passed."""


class WeightSyncError(RolloutError):
    """The engine does not serve the weights that it was sent; the message names the tensor."""


class StoppedWaitingError(RolloutError):
    """The run was asked to stop while it waited for servers, or for responses; it goes on when it is started again."""


class MismatchError(RolloutError):
    """The engine's log-probs are not the policy's; the message says how far they are apart, and nothing was learned."""


class TransientServerError(RolloutError):
    """The server could not be reached, was too slow, or failed on its side: another try may work."""


class RefusedRequestError(RolloutError):
    """The server understood the request and refused it (4xx): the same request will fail again."""


class LaunchError(RuntimeError):
    """A job could not be handed to what is to run it; the message has its answer."""


class StopRequested(RuntimeError):  # noqa: N818  it is no error
    """The run was asked to stop, has written a checkpoint and goes on from there when it is started again."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message names the folder and the remedy."""


class NonFiniteGradientError(RuntimeError):
    """Too many optimizer steps in a row had gradients that are NaN or infinite; none of them was applied."""


# What ends a run that goes on when it is started again.
ASKED_TO_STOP = (StopRequested, StoppedWaitingError)
# What the person who started a run can mend: the input.
BAD_INPUT = (ConfigError, BackendUnavailableError, MissingDependencyError, TaskError)
# What ended a run whose input was fine.
STOPPED = (
    CheckpointError,
    InvalidSampleError,
    LossInputError,
    NonFiniteGradientError,
    RolloutError,
    ScoringError,
)

# Exit codes of the commands. 4 is that of a rank that ends because another has failed (distributed/lifeline.py).
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 3  # the rollout engine gave out, a checkpoint cannot be read or written, a gradient is NaN, ...
EXIT_START_AGAIN = 75  # EX_TEMPFAIL: asked to stop, and saved
