"""vitft: from a folder of photographs to a classifier with numbers you can trust.

Importing it registers the `vitflower_*` Vision Transformers with timm, and does nothing else.
"""

__version__ = "0.1.0"

from vitft import vit as vit  # noqa: E402  (registers the models; vit may want the version)
