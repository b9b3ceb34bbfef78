"""How much memory a program of its own takes to combine files."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_PROGRAM = """
import sys
import torch
from lightning_soup.weights.save import save_combination
*sources, output = sys.argv[1:]
def memory():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
save_combination([{"w": torch.ones(9)}], [1.0], "warm." + output.rpartition(".")[2])
before, peak = memory(), []
def progress(items, description, total):
    for item in items:
        peak.append(memory())
        yield item
save_combination(sources, [1 / len(sources)] * len(sources), output, progress=progress)
print(max(peak) - before)
"""


def extra_memory(folder: Path, sources: Sequence[str], output: str) -> int:
    """Bytes above the imports that averaging ``sources`` into ``output`` takes at its peak; names within ``folder``."""
    command = [sys.executable, "-c", _PROGRAM, *sources, output]
    return int(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout)
