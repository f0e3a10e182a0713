"""What can go wrong, as one small tree. Every message is one sentence that says what to do.

Wrong arguments of a call are `ValueError` or `TypeError`; everything below is about data, files and models.
"""

import importlib
import reprlib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import islice
from numbers import Integral
from typing import Any, cast

NAMED = 24  # valid names that a message lists
COMPARED = 20_000  # names among which the nearest is looked for: about 0.2 s


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


def choices(given: object, known: Iterable[object], other: str = "") -> str:
    """What a message about a wrong name ends with: the nearest valid name, if one is near, and the valid ones.

    known: the valid names in the order in which they are shown; other: what is valid besides them, in words.
    """
    names = [str(name) for name in known]
    listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    wanted = " or ".join(filter(None, [f"one of {listed}" if names else "", other])) or "none"
    return f"{meant(given, names)}give {wanted}"


def meant(given: object, known: Iterable[str]) -> str:
    """A question that names the nearest of the known names (of the first COMPARED), or nothing if none is near."""
    digits = [letter for letter in str(given) if letter.isdigit()]  # another number is no slip of the hand
    alike = (name for name in islice(known, COMPARED) if [letter for letter in name if letter.isdigit()] == digits)
    folded = {name.casefold(): name for name in alike}
    near = get_close_matches(str(given).casefold(), folded, n=1, cutoff=0.6)
    return f"did you mean {folded[near[0]]!r}? " if near else ""


def needs(module: str, what: str, *, extra: str = "", pip: str = "") -> Any:
    """A module of a package that need not be installed.

    what: what needs it, as the beginning of a sentence; extra: the extra of leaveout that brings it; or pip: what pip
    is to install.
    Raises: UnsupportedError that says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package, wanted = module.partition(".")[0], f"'leaveout[{extra}]'" if extra else pip
        raise UnsupportedError(f"{what} needs the package {package}: pip install {wanted}.") from error


def require_whole(name: str, value: object, least: int) -> None:
    """Raises: ValueError if the value is no whole number (a numpy integer is one) or is smaller than `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}.")


def require_list(name: str, value: object, of: str) -> None:
    """Raises: TypeError for one thing, such as a text or an object with fields, where a list of them is wanted."""
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise TypeError(f"{name} is {reprlib.repr(cast(object, value))}: give a list of {of}.")


def refuse_other_names(what: str, given: Iterable[object], known: Iterable[str]) -> None:
    """Raises: TypeError for the first given name that is not a known one, such as an option of a call."""
    known = list(known)
    for name in given:
        if name not in known:
            raise TypeError(f"There is no {what} {str(name)!r}: {choices(name, known)}.")
