"""MEND (Mitchell et al., ICLR 2022, arXiv 2110.11309): a meta-learned editor of gradients.

    factors.py    the gradient of an edit's loss, as rank-one factors
    networks.py   the networks that map these factors to an update
    training.py   how the networks are trained
    train.py      the command: python -m baselines.mend.train (configuration: config.yaml)
    method.py     the trained editor as an editing method like any other

The published code differentiates through edited models with `higher`, which no longer follows today's PyTorch.
`torch.func` does it better: `vjp` gives the factors, `functional_call` the edited model, both without patching modules.
"""

from .method import MEND, MendHParams

__all__ = ["MEND", "MendHParams"]
