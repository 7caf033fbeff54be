"""probe: turn a pretrained vision backbone into a classifier that one can trust.

The public names live here and are imported when first used (PEP 562): importing `probe` loads no jax.
"""
