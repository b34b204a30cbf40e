"""fot: train Focused Transformers (arXiv 2307.03170) in JAX."""
