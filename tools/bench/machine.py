"""What a benchmark's JSON says about where and when it was measured."""

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def about() -> dict[str, Any]:
    """Machine, threads, versions, date and commit."""
    import timm

    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    wide = "avx512f" in " ".join(lines)
    return f"{names[0] if names else platform.machine()}, {'AVX-512' if wide else 'AVX2 or less'}"


def _commit() -> str:
    """The commit, with a + where files differ from it; empty where git or repository is missing."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        done = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        )
    except OSError:
        return ""
    return done.stdout.strip() + ("+" if dirty.stdout.strip() else "")
