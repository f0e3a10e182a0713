"""The one on-disk format: a directory of immutable segments and one SQLite catalogue (docs/reference/format.md)."""

from leaveout.store.catalogue import Record
from leaveout.store.segment import Segment
from leaveout.store.store import Store

__all__ = ["Record", "Segment", "Store"]
