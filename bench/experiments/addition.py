"""Digit addition: two digits in two channels, each distorted in its own way; the label is their sum (appendix A.2).

Two transformers beside each other read both channels, so that the classifier gets four: each may take care of one
digit. ST-CNN, which the paper does not have here, is for the quick run: a thousand digits and minutes are too few for
fully connected networks to learn sums. FCN and CNN have as many parameters as their
twins. Split, scenes and schedule as in `digits`.
"""

from __future__ import annotations

import sys

from .classification import Settings, Study, main
from .data import ADDITION

PAPER = {
    "FCN": (47.7,), "CNN": (14.7,), "ST-FCN affine": (9.0,), "ST-FCN projective": (5.9,),
    "ST-FCN thin_plate_spline": (5.8,),
}  # fmt: skip
QUICK = Settings(
    ("FCN", "ST-FCN affine", "CNN", "ST-CNN affine"), fully_connected=300_000, convolutional=60_000,
    batch=64, epochs=120, rate=3e-3, ramp=0.5,
)  # fmt: skip
FULL = Settings(
    tuple(PAPER), fully_connected=800_000, convolutional=800_000,
    batch=256, epochs=150, rate=3e-3, ramp=0.5,
)  # fmt: skip

STUDY = Study("addition", "Digit addition", __doc__, {"addition": ADDITION}, PAPER, QUICK, FULL, parallel=2)

if __name__ == "__main__":
    sys.exit(main(STUDY))
