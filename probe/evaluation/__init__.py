"""How good a classifier is: sums, figures and their intervals, calibration, and comparison on the same rows."""
