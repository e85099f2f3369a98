"""Triton operators the runtime calls: one folder per operator, each beside its plain-torch reference.

The version stands here because Transformers asks any installed package of this name for one.
"""

__version__ = "0.0.0"
