"""Categories of features: a taxonomy, assignments to it, their shares, and clusters found without it."""

from lorascope.explain.categories.stage import CategorizeConfig, categorize

__all__ = ["CategorizeConfig", "categorize"]
