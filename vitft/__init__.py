"""vitft: from a folder of photographs to a classifier with numbers you can trust.

Importing it registers the `vitflower_*` Vision Transformers with timm, and does nothing else.
"""

import gc

# torch and timm make hundreds of thousands of objects and no garbage; looking for some on the way,
# and at each of them again soon after, would take a third of every command
_collects = gc.isenabled()
gc.disable()
try:
    from vitft import vitflower as vitflower
    from vitft.vit import VisionTransformer as VisionTransformer
finally:
    if gc.get_freeze_count() < 1000:  # what a host froze is not ours; 375 are Python 3.12's own
        gc.freeze()
        gc.unfreeze()  # into the oldest generation, as if all had been looked at
    if _collects:
        gc.enable()

__version__ = "0.2.0"
