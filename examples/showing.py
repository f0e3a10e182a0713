"""The table that every example prints: predicted against really retrained, and whether the interval held."""

from __future__ import annotations

from leaveout.deletion.predict import Verification


def show(title: str, verification: Verification, lines: int = 12) -> None:
    """Prints the first lines of a verification and its summary."""
    print(f"\n{title}")
    print(f"{'query':<28}{'without':<34}{'all data':>9}{'predicted':>10}{'95 % interval':>19}{'actual':>9}")
    low, high = verification.interval()
    flat = zip(verification.lines(), low.ravel(), high.ravel(), strict=True)
    for line, left, right in list(flat)[:lines]:
        interval = f"{left:.3f} to {right:.3f}"
        print(
            f"{short(line['query'], 26):<28}{short(line['without'], 32):<34}{line['base']:>9.3f}{line['predicted']:>10.3f}"
            f"{interval:>19}{line['actual']:>9.3f} {'inside' if line['inside'] else 'OUTSIDE'}"
        )
    found = verification.summary()
    if found["coverage"] is None:
        print(f"{found['queries']} queries: all sets were measured before, so that nothing is proved")
        return
    rank = "" if found["spearman"] is None else f"rank correlation {found['spearman']:.2f}, "
    print(
        f"{found['queries']} queries, {found['sets']} sets: {found['coverage']:.0%} of the actual values are inside, "
        f"{rank}median relative error {found['relative_error']:.2f}"
    )


def short(text: str, length: int) -> str:
    """A text on one line, cut to a length."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."
