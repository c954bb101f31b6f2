"""Memory of a call, for the benchmarks (Linux)."""

import ctypes
import math
import os
import re
from pathlib import Path


def process_memory(field):
    """VmRSS (now) or VmHWM (peak) of this process in MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024


def added_memory(function):
    """Peak memory in MB that a call adds, measured in a fork."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        # Free memory that malloc keeps would hide what the call needs: none is kept, and tensors
        # get pages of their own (M_MMAP_THRESHOLD is -3).
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 16)
        function()  # code that runs for the first time takes memory as well
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        before = process_memory("VmRSS")
        function()
        os.write(write, str(process_memory("VmHWM") - before).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return float(answer) if answer else math.nan
