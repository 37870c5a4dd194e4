"""Translated, cluttered digits: one digit anywhere on 60 × 60 pixels, among pieces of others (appendix A.1).

The transformer has to find the digit. FCN and CNN have as many parameters as their twins. Split, scenes and
schedule as in `digits`.
"""

from __future__ import annotations

import sys

from .classification import Settings, Study, main
from .data import CLUTTERED

PAPER = {"FCN": (13.2,), "CNN": (3.5,), "ST-FCN affine": (2.0,), "ST-CNN affine": (1.7,)}
QUICK = Settings(
    ("FCN", "ST-FCN affine", "CNN", "ST-CNN affine"), fully_connected=300_000, convolutional=32_000,
    batch=64, epochs=40, rate=3e-3, ramp=0.5,
)  # fmt: skip
FULL = Settings(
    tuple(PAPER), fully_connected=400_000, convolutional=400_000,
    batch=256, epochs=150, rate=3e-3, ramp=0.5,
)  # fmt: skip

STUDY = Study(
    "cluttered", "Translated, cluttered digits", __doc__, {"cluttered": CLUTTERED}, PAPER, QUICK, FULL
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STUDY))
