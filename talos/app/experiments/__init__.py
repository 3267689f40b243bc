"""Experiments: models, tasks, methods and seeds out of one recipe; each cell is made once.

A cell is one step: a mask, a trained vector, an evaluation. Nothing here prints.
"""

from talos.app.experiments.recipe import Recipe, Row, read_recipe

__all__ = ["Recipe", "Row", "read_recipe"]
