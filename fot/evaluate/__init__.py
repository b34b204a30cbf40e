"""Evaluations, one file each; `python -m fot.evaluate NAME` runs one."""
