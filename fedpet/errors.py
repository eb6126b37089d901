"""Define exceptions: user errors, run errors, rejected replies.

    FedpetError
    ├── InputError            what a user gave; the command line exits with 2
    │   ├── ConfigError       an experiment's key or value
    │   ├── BackboneError     a checkpoint that is absent, out of reach or of another kind
    │   ├── DataError         rows, columns, labels, clients
    │   │   └── AbsentDataError   a file, folder or cache that is not there; quotes no row
    │   └── StructureError    a structure for another backbone, or one that does not fit
    ├── RunError              the run failed, or nothing was learned; exits with 1
    │   └── Stalled           too many rounds in a row came to no average; can be gone on with
    ├── RunInterrupted        stopped from outside; exits with 130 (Ctrl-C) or 143 (SIGTERM)
    └── ReplyError            one client's reply is refused; the round goes on (law 7)
        ├── FrameError        bytes that are no frame of this plan and round
        ├── PlanError         a plan that this node does not hold, or cannot follow
        └── TrainingError     local training that gave no usable values

Every message says the rule, what came, and what to do; a `ReplyError` says also who.
"""


class FedpetError(Exception):
    """Any error this package raises on purpose."""


class InputError(FedpetError, ValueError):
    """Something a user gave is wrong. The message is one clear sentence or two."""


class ConfigError(InputError):
    """A key or a value of an experiment."""


class BackboneError(InputError):
    """A checkpoint that cannot be used."""


class DataError(InputError):
    """Rows, columns, labels or clients that cannot be used."""


class AbsentDataError(DataError):
    """A file or folder of rows, or a cache, that is not there: the message quotes no row."""


class StructureError(InputError):
    """A structure that does not fit its backbone or its budget."""


class RunError(FedpetError, RuntimeError):
    """The run failed, or no round learned anything."""


class Stalled(RunError):
    """Too many rounds in a row came to no average."""


class ReplyError(FedpetError):
    """A reply, or a request, that must not become part of the average."""


class FrameError(ReplyError):
    """Bytes that are not a well-formed frame of the plan, codec and round in force."""


class PlanError(ReplyError):
    """A plan that is not held here, or does not fit the checkpoint here."""


class TrainingError(ReplyError):
    """Local training gave nothing that may be averaged."""


class RunInterrupted(FedpetError):
    """A run was stopped from outside; the message says how to go on with it.

    Attributes:
        exit_code: Of the command line: 128 and the signal's number.
    """

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code
