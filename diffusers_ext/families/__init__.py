"""Base-model families: one file each says all that the tools must know of it."""

from diffusers_ext.families.family import Family
from diffusers_ext.families.registry import FAMILIES, find_family, match_family

__all__ = ["FAMILIES", "Family", "find_family", "match_family"]
