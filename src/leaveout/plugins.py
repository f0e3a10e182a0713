"""What other packages add: attribution methods, model families, and rules for operations of torch.

One entry-point group with three hooks. A package adds one object by one line of its pyproject.toml, whose name says
which hook it is for:

    [project.entry-points."leaveout.plugins"]
    "method.word-overlap" = "my_package:word_overlap"       # a method, used by the name word-overlap
    "family.opt" = "my_package:opt"                         # a family, for models whose config says model_type = "opt"
    "rule.aten.sinc.default" = "my_package:sinc"            # a rule, for the operation torch.ops.aten.sinc.default

Nothing of a package is imported before the method, the family or the operation is used.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args

from leaveout.errors import MismatchError, UnsupportedError, choices

GROUP = "leaveout.plugins"
Hook = Literal["method", "family", "rule"]


def found(hook: Hook) -> dict[str, EntryPoint]:
    """What installed packages add to a hook, by name, not imported yet: see `load`.

    Raises: MismatchError if two packages add the same name, or a name that says no hook.
    """
    return _by_hook()[hook]


def load(entry: EntryPoint) -> Any:
    """The object that an entry names.

    Raises: UnsupportedError if it does not import.
    """
    try:
        return entry.load()
    except (Exception, SystemExit) as error:  # whatever the package of another does when it is imported
        raise UnsupportedError(
            f"The plug-in {entry.name!r} ({entry.value}) does not import ({type(error).__name__}: {error}): "
            "mend or uninstall its package."
        ) from error


@cache
def _by_hook() -> dict[str, dict[str, EntryPoint]]:
    """All entries of the group, sorted by name: read once a process."""
    out: dict[str, dict[str, EntryPoint]] = {hook: {} for hook in get_args(Hook)}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        hook, _, name = entry.name.partition(".")
        if hook not in out or not name:
            what = f"The plug-in {entry.name!r} ({entry.value}) names no hook"
            raise MismatchError(f"{what}: call it HOOK.NAME; for HOOK, {choices(hook, out)}.")
        other = out[hook].get(name)
        if other is not None and other.value != entry.value:
            raise MismatchError(
                f"Two packages add the {hook} {name!r} ({other.value} and {entry.value}): uninstall one of them."
            )
        out[hook][name] = entry
    return out
