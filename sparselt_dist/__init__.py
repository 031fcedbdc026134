"""sparselt_dist: pretrain language models; the objective is a plug-in, the scale a setting.

Importing this package imports neither torch nor transformers, so that command lines answer at once.
"""

__version__ = "0.1.0"
