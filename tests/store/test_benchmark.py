"""Batches of the catalogue."""

from pathlib import Path

import numpy as np

from leaveout.store import Record, Store, catalogue


def test_put_writes_a_whole_number_of_batches_and_the_rest(tmp_path: Path) -> None:
    n_rows = 2 * catalogue._LINES + 1
    with Store.create(tmp_path / "store", {}) as store:
        records = [Record(str(n), f"text {n}", "unit") for n in range(n_rows)]
        store.put(records, {"x": np.arange(n_rows)})
        assert list(store.iter_rows()) == records and store.check() == []
