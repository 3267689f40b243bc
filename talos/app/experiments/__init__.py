"""Experiments: a recipe in TOML, run cell by cell, that ends in tables.

`read_recipe` reads a recipe. A cell is one step of it: a mask, a trained vector, an evaluation.
Nothing here prints.
"""

from talos.app.experiments.recipe import Recipe, Row, read_recipe

__all__ = ["Recipe", "Row", "read_recipe"]
