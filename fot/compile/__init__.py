"""Compiling the train step for TPUs that are not there: what it needs, what it moves, what it may cost."""
