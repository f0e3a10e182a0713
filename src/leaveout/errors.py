"""What can go wrong, as one small tree. Every message is one sentence that says what to do.

Wrong arguments of a call are `ValueError` or `TypeError`; everything below is about data, files and models.
"""


class LeaveoutError(Exception):
    """Root of all errors that leaveout raises about data, files and models."""


class FormatError(LeaveoutError):
    """A file or a row is not in the form it claims to be."""


class MismatchError(LeaveoutError):
    """Two things that must belong together do not: model and index, settings and segment, query and index."""


class UnsupportedError(LeaveoutError):
    """The model, operation or option is not one that leaveout can handle."""


class StabilityError(LeaveoutError):
    """A power series of a training run grows without bound, so that no prediction can be made from it."""
