"""What holds for all tests."""

import gc


def pytest_collection_finish():
    """Garbage is looked for among what tests make, not each time among all that was imported (kronfluence asks ten times)."""
    gc.collect()
    gc.freeze()
