"""What every benchmark says about where it ran; standard library only."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path


def cpu() -> str:
    """Model and the flags that matter to the kernels."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    model = next(
        (line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "unknown"
    )
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return f"{model}: {' '.join(f for f in flags if f.startswith(('avx', 'fma', 'amx')))}"


def commit() -> str:
    """Commit of the working tree, with -dirty where it has changes."""
    command = ["git", "describe", "--always", "--dirty"]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def peak_mb() -> float:
    """Largest resident memory of this process so far; what it was forked from does not count (as in ru_maxrss)."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
