"""vitft: from a folder of photographs to a classifier with numbers you can trust.

Importing it registers the `vitflower_*` Vision Transformers with timm, and does nothing else.
"""

from vitft import vitflower as vitflower
from vitft.vit import VisionTransformer as VisionTransformer

__version__ = "0.2.0"
