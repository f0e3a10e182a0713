"""What a number in a result file depends on besides its recipe: commit, versions, processor, threads, memory."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers

import leaveout


def provenance(seed: int) -> dict[str, Any]:
    """A dictionary for the JSON of a benchmark or a run; peak memory in megabytes so far."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ":/", *MADE)),  # results and pages do not change a result
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {
            "leaveout": leaveout.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "transformers": transformers.__version__,
        },
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


MADE = (":(top,exclude)benchmarks/results", ":(top,exclude)docs", ":(top,exclude)README.md")


def _git(*args: str) -> str | None:
    """Output of git in the source tree, None where there is none."""
    try:
        done = subprocess.run(
            ["git", *args], capture_output=True, text=True, check=True, cwd=Path(__file__).parent, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = dict(line.split(":", 1) for line in lines[:30] if ":" in line)
        names = {key.strip(): value.strip() for key, value in facts.items()}
        return f"{names.get('model name', '?')} (family {names.get('cpu family')}, model {names.get('model')})"
    except OSError:
        return platform.processor()
