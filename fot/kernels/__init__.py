"""Pallas kernels for TPUs, each beside a jnp reference of the same signature."""
