"""Checkpoints of the LLaMA family in, Focused Transformers out."""
