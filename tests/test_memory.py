"""The allocator setting: large blocks come back without new page faults."""

import subprocess
import sys

from tidegate.memory import keep_freed_memory

SCRIPT = """
import resource, sys, torch
from tidegate.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(12)  # until there is room enough for aligned blocks
print(faults(5))
"""


def test_large_blocks_are_reused():
    if not keep_freed_memory():  # another C library: it says so, and changes nothing
        return
    faults = {}
    for mode in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(done.stdout)
    assert faults["keep"] < faults["default"] / 10
