"""Training: the steps, the loop and its checkpoints, who learns and how fast, augmentation, and the verdict."""
