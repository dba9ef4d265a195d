"""The methods' solves by dense in x in matrices and a general LU, anew for each batch.

All return X (in x n), with which an update is Delta = R X^T.
"""

from __future__ import annotations

import torch
from torch import Tensor


def projector(second_moment: Tensor, threshold: float) -> Tensor:
    """P (in x in): onto the eigenvectors of M (in x in) whose eigenvalues are below `threshold`."""
    values, vectors = torch.linalg.eigh(second_moment)
    null = vectors[:, values < threshold]
    return null @ null.T


def alphaedit(p: Tensor, keys: Tensor, cache: Tensor, ridge: float) -> Tensor:
    """X = (P (C + K K^T) + L2 I)^-1 P K for K (in x n), C (in x in) the sum of K K^T over earlier batches."""
    system = p @ (cache + keys @ keys.T) + ridge * torch.eye(len(p)).to(p)
    return torch.linalg.solve(system, p @ keys)


def memit(second_moment: Tensor, keys: Tensor, cache: Tensor | None, weight: float) -> Tensor:
    """X = (lambda M + C + K K^T)^-1 K; C is None for MEMIT, which forgets earlier batches."""
    system = weight * second_moment + keys @ keys.T
    if cache is not None:
        system = system + cache
    return torch.linalg.solve(system, keys)


def emmet(second_moment: Tensor, keys: Tensor, weight: float, ridge: float, lambda_e: float) -> Tensor:
    """X = C^-1 K (K^T C^-1 K + lambda_e I)^-1 with C = lambda M + mu I."""
    c_k = torch.linalg.solve(weight * second_moment + ridge * torch.eye(len(keys)).to(keys), keys)  # in x n
    system = keys.T @ c_k + lambda_e * torch.eye(keys.shape[1]).to(keys)  # n x n
    return torch.linalg.solve(system, c_k, left=False)


def encore(second_moment: Tensor, keys: Tensor, cache: Tensor, weight: float, ridge: float) -> Tensor:
    """X = (lambda M + mu I + C + K K^T)^-1 K."""
    system = weight * second_moment + ridge * torch.eye(len(keys)).to(keys) + cache + keys @ keys.T
    return torch.linalg.solve(system, keys)


def betaedit(
    p: Tensor, second_moment: Tensor, keys: Tensor, cache: Tensor, weight: float, ridge: float
) -> Tensor:
    """X = (P (K K^T + C + l1 M) + l2 I)^-1 P K."""
    system = p @ (keys @ keys.T + cache + weight * second_moment) + ridge * torch.eye(len(p)).to(p)
    return torch.linalg.solve(system, p @ keys)


def lyaplock(
    weights: tuple[Tensor, Tensor],
    second_moment: Tensor,
    keys: Tensor,
    residual: Tensor,
    earlier: list[tuple[Tensor, Tensor]],
    weight: float,
) -> Tensor:
    """Delta (out x in), the least of ||R - Delta K||^2 + sum ||(W + Delta) K_i - V_i||^2 + q lambda PL(W + Delta).

    As one least-squares problem over the columns [K, K_i, sqrt(q lambda) M^1/2] and what Delta shall make of them.

    Args:
        weights: W_0 and W (out x in).
        earlier: K_i (in x n_i) and V_i (out x n_i) of each earlier batch.
        weight: q lambda.
    """
    original, now = weights
    values, vectors = torch.linalg.eigh(second_moment)
    root = vectors * (weight * values.clamp(min=0)).sqrt()  # in x in
    inputs = torch.cat([keys, *(k for k, _ in earlier), root], dim=1)
    wanted = torch.cat([residual, *(v - now @ k for k, v in earlier), (original - now) @ root], dim=1)
    return torch.linalg.lstsq(inputs.T, wanted.T, driver="gelsd").solution.T


def lyaplock_queue(losses: list[float], bound: float) -> float:
    """a Z_t after batches of these preservation losses, with a = 1 / sqrt(D) and Z_1 = Z_max = sqrt(D).

    Z <- max(Z + a (PL - D), Z_max) after each of them.
    """
    limit = bound * losses[0]  # D
    step, queue = limit**-0.5, limit**0.5
    for loss in losses:
        queue = max(queue + step * (loss - limit), limit**0.5)
    return step * queue
