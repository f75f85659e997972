"""Fuzzing by hand, as long as wanted.

python -m tests.fuzz graphs [counting|tiny] [COUNT] [SEED]      # weights unchanged
"""

from __future__ import annotations

import sys
import time

from tests.fuzz.samples import ALL
from tests.fuzz.weights import walk


def main(what: str = "graphs", *rest: str) -> None:
    """Runs one kind of fuzzing and prints what came of it."""
    if what != "graphs":
        sys.exit(__doc__)
    name, count, seed = (*rest, *("counting", "1000", "0")[len(rest) :])
    begun = time.perf_counter()
    tally = walk(name, int(seed), int(count), every=100)
    print(f"{name} from {seed}: {tally} ({time.perf_counter() - begun:.0f} s)")
    for reason, times in (tally.refused + tally.reasons).most_common(25):
        print(f"    {times:6}  {reason}")
    print(f"    not tried: {sorted(ALL - tally.operations)}")
    print(f"    {dict(tally.kinds)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
