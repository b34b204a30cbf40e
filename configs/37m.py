"""FoT 37M for documents of the user's own: the model and batch of dictionary lookup (FoT, Appendix D)."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    return base.paper_37m()
