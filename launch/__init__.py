"""Launching: training jobs on clusters and pods, from one description."""
