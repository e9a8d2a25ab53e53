"""What a call adds to the memory of this process at its peak (Linux)."""

import ctypes
from pathlib import Path


class Peak:
    """Peak from now on; freed memory is given back before, so that it does not hide what is new."""

    def __init__(self):
        """Begin."""
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _resident_kb("VmRSS")

    def mb(self):
        """Megabytes above the start."""
        return (_resident_kb("VmHWM") - self.before) / 1024


def _resident_kb(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
