"""Documents in, batches of rows out."""
