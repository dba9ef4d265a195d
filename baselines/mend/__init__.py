"""MEND (Mitchell et al., ICLR 2022, arXiv 2110.11309): a meta-learned editor of gradients.

    factors.py    the gradient of an edit's loss, as rank-one factors
    networks.py   the networks that map these factors to an update
    training.py   how the networks are trained
    train.py      the command: python -m baselines.mend.train (configuration: config.yaml)
    method.py     the trained editor as an editing method like any other

The published code records factors with hooks of backward passes and differentiates through edited models with `higher`.
Here `torch.func` does both without patching modules: `vjp` gives the factors, `functional_call` the edited model.
`higher` still runs on today's PyTorch, and tests/test_mend.py compares with it on GPT-2; it cannot copy a model whose
forward slices its list of layers, as transformers' Llama does.
"""

from .method import MEND, MendHParams

__all__ = ["MEND", "MendHParams"]
