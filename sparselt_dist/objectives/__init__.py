"""Objectives: the registry and the built-in plug-ins."""

from sparselt_dist.objectives.base import available, get_objective, register

__all__ = ["available", "get_objective", "register"]
