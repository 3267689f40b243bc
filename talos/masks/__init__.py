"""Which entries of a model are trained."""

from talos.masks.mask import Mask

__all__ = ["Mask"]
