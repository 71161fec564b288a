"""`from standalone import io`: the door alone, without torch, for children born to be killed."""

import sys
import types
from pathlib import Path

if "vitft" not in sys.modules:
    package = types.ModuleType("vitft")
    package.__path__ = [str(Path(__file__).resolve().parents[1] / "vitft")]
    package.__version__ = "alone"
    sys.modules["vitft"] = package

from vitft import io as io
