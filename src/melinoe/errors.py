"""
Every deliberate error. Each message is one sentence: what happened, and the way out.

    MelinoeError                  anything a user can put right; exit code 1
    |-- ModelError                the model
    |   |-- UnsupportedModelError     its family cannot be served
    |   |-- CheckpointError           its files are missing, torn or of an unsupported kind
    |   `-- TokenizerError            its tokenizer is missing or belongs to another model
    |-- DataError                 an input file or data set
    |-- TraceError                a trace is malformed, or of another model
    |-- CacheTooSmallError        one request needs more experts than there are slots
    |-- BudgetError               a memory budget below the smallest that works
    |   |-- PinError                  the system refuses to lock that much host memory
    |   `-- UnknownNeedError          how much memory a model takes cannot be told beforehand
    |-- HardwareError             a figure that no machine has, or a part that is not known
    |-- OutputExistsError         the place to write to is taken
    |-- WriteError                something could not be written: a full disk, a forbidden place
    |-- TrainingError             a fine-tuning run cannot go on
    |   `-- InterruptedRunError       it was asked to stop, and can be resumed
    |-- DependencyError           an optional library is not installed
    `-- AttachError               the runtime is where it cannot be, or is not where it must be
"""


class MelinoeError(Exception):
    """Anything a user can put right."""


class ModelError(MelinoeError):
    """The model cannot be used as given."""


class UnsupportedModelError(ModelError):
    """The model's family cannot be served."""


class CheckpointError(ModelError):
    """The checkpoint's files are missing, torn or of an unsupported kind."""


class TokenizerError(ModelError):
    """The tokenizer is missing, or belongs to another model."""


class DataError(MelinoeError):
    """An input file or data set is unusable."""


class TraceError(MelinoeError):
    """A trace is malformed, or was taken from another model."""


class CacheTooSmallError(MelinoeError):
    """One request needs more experts than there are slots."""


class BudgetError(MelinoeError):
    """A memory budget is below the smallest that works."""


class PinError(BudgetError):
    """The system refuses to lock that much host memory."""


class UnknownNeedError(BudgetError):
    """How much memory a model takes cannot be told beforehand."""


class HardwareError(MelinoeError):
    """A figure of hardware that no machine has, or the name of a part that is not known."""


class OutputExistsError(MelinoeError):
    """The place to write to is taken."""


class WriteError(MelinoeError):
    """Something could not be written: a full disk, a forbidden place."""


class TrainingError(MelinoeError):
    """A fine-tuning run cannot go on."""


class InterruptedRunError(TrainingError):
    """A fine-tuning run was asked to stop; its state is kept, and it can be resumed."""


class DependencyError(MelinoeError):
    """An optional library is not installed."""


class AttachError(MelinoeError):
    """The runtime is attached where it cannot be, or not attached where it must be."""
