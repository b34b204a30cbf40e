"""Attention to a memory: a file for each way to read one."""
