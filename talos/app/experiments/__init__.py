"""Experiments: models, tasks, methods and seeds out of one recipe; each cell is made once."""
