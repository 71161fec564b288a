"""What the findings say on the report page."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from vitft import chapters, trust


def test_the_calibration_tile_says_what_perfect_probabilities_would_show():
    before = trust.calibration(np.full((35, 2), 0.5), np.arange(35) % 2, count=20)
    found = SimpleNamespace(before=replace(before, ece=0.246, ece_floor=0.204), after=None)
    ((name, value, meaning),) = chapters.figures(found)
    assert name == "Calibration error"
    assert value.startswith("24.6 points [")
    assert meaning.endswith("; perfect ones would show 20.4 on as many photographs")
    found.after = replace(before, ece_floor=0.198)
    assert "perfect ones would show 19.8 on" in chapters.figures(found)[0][2]
