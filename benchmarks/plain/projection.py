"""SPHERE's projection by an eigendecomposition of the in x in matrix W_hat^T W_hat / out."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_directions(weight: Tensor, beta_hse: float) -> Tensor:
    """U (in x r) of W (out x in), in the weight's dtype: give float64 for an oracle."""
    out_features = len(weight)
    normed = weight / (weight.norm(dim=1, keepdim=True) + 1e-8)  # W_hat: out x in
    values, vectors = torch.linalg.eigh(normed.T @ normed / out_features)  # in; in x in
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)  # decreasing
    ratio = values.double().cumsum(0) / values.double().sum()
    r = int((ratio <= beta_hse).sum()) + 1
    return vectors[:, : min(r, rank(values, weight))]


def rank(values: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> int:
    """Number of eigenvalues that are not zero, given the precision `dtype` that the weight was made in."""
    size = max(weight.shape)
    as_singular_value = (size * torch.finfo(dtype or weight.dtype).eps) ** 2
    as_eigenvalue = size * torch.finfo(values.dtype).eps
    return int((values > max(as_singular_value, as_eigenvalue) * values[0]).sum())


def project_update(delta: Tensor, weight: Tensor, beta_hse: float, alpha: float) -> Tensor:
    """Delta (I - alpha P), P = U U^T (in x in)."""
    basis = principal_directions(weight, beta_hse)
    projector = basis @ basis.T
    return delta - alpha * delta @ projector


def principal_change(delta: Tensor, weight: Tensor, original: Tensor, basis: Tensor, alpha: float) -> float:
    """||(W_new - W_0) U||^2 / ||W U||^2, every row divided by the norm that it has in W (out x in)."""
    norms = weight.norm(dim=1, keepdim=True)
    new = weight + delta - alpha * delta @ basis @ basis.T
    return float(((new - original) / norms @ basis).norm() / (weight / norms @ basis).norm()) ** 2


def smallest_alpha(
    budget: float, delta: Tensor, weight: Tensor, original: Tensor, basis: Tensor, steps: int
) -> float:
    """The first of 0, 1 / steps, ..., 1 whose principal change is within the budget, else that of the least change."""
    alphas = [i / steps for i in range(steps + 1)]
    changes = [principal_change(delta, weight, original, basis, alpha) for alpha in alphas]
    within = [alpha for alpha, change in zip(alphas, changes, strict=True) if change <= budget]
    return within[0] if within else alphas[changes.index(min(changes))]
