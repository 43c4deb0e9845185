"""Weight saliency: scores, one-bit masks and the masked optimizer step."""

from salun_core.saliency.mask import SaliencyMask
from salun_core.saliency.masked_step import masked_optimizer
from salun_core.saliency.scores import saliency_scores

__all__ = ["SaliencyMask", "masked_optimizer", "saliency_scores"]
