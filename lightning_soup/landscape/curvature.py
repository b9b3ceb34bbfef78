"""How sharp a minimum is: the largest eigenvalues of the Hessian, and its trace.

H = ∇²L(θ). Both figures change when weights are rescaled without changing the function, so compare them within one
architecture only; a network that has learned nothing looks flat.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.landscape.objective import Objective
from lightning_soup.progress import Progress, silent

__all__ = ["Eigenvalues", "Trace", "hessian_top_eigenvalues", "hessian_trace"]

_BASIS_BYTES = 2 << 30  # of vectors that are kept to stay orthogonal to

_KEPT = 0.5**0.5  # of a vector's length: what is left is orthogonal then (Daniel, Gragg, Kaufman, Stewart, 1976)


@dataclass(frozen=True)
class Eigenvalues:
    """What Lanczos found.

    Attributes:
        values: The largest algebraic eigenvalues, from the largest on.
        errors: A bound on the distance of each from an eigenvalue.
        steps: Hessian products that it took.
        converged: Whether all errors are below the tolerance.
    """

    values: tuple[float, ...]
    errors: tuple[float, ...]
    steps: int
    converged: bool


@dataclass(frozen=True)
class Trace:
    """What Hutchinson's estimator found.

    Attributes:
        value: tr H; it may be below 0.
        error: Its standard error.
        probes: Hessian products that it took.
    """

    value: float
    error: float
    probes: int


def hessian_top_eigenvalues(
    objective: Objective,
    k: int = 1,
    *,
    max_steps: int = 60,
    tolerance: float = 1e-3,
    seed: int = 0,
    progress: Progress = silent,
) -> Eigenvalues:
    """The k largest *algebraic* eigenvalues of the Hessian, by Lanczos' method.

    Each Ritz value θ̂ of the tridiagonal T has an eigenvalue within |β_j·s_j|, β_j being T's next off-diagonal element
    and s_j the last of its eigenvector; the method ends when this is below tolerance·|θ̂| for all k. Vectors are kept
    orthogonal to all before them where these fit into 2 GiB, and to the last two otherwise, which leaves the largest
    value right but repeats it among the next. An eigenvalue of multiplicity m counts once.

    Args:
        objective: The loss at the weights to judge.
        k: How many.
        max_steps: Hessian products at most.
        tolerance: Relative error at most.
        seed: Of the first vector.
        progress: Shows how far it is.

    Raises:
        UnsupportedSetup: A value is out of range.
        NonFiniteWeights: The Hessian is not finite.

    Source: Golub, Van Loan, Matrix Computations, chapter 10.
    """
    if k < 1 or max_steps < 1 or tolerance <= 0:
        raise UnsupportedSetup(
            f"hessian_top_eigenvalues(k={k}, max_steps={max_steps}, tolerance={tolerance}): expected k and max_steps "
            "of 1 or more, and a tolerance above 0."
        )
    size, dtype = objective.size, objective.dtype
    limit = min(max_steps, size)
    fits = limit * size * dtype.itemsize <= _BASIS_BYTES
    vector = _first(objective, seed)
    basis = vector.new_empty(limit if fits else 2, size)  # its rows; else the newest two in turn
    alphas, betas = [], []
    found = Eigenvalues((), (), 0, False)
    for step in progress(range(limit), "Lanczos", limit):
        current = basis[step % len(basis)]
        current.copy_(vector)
        after = objective.product(current)
        alphas.append(float(torch.dot(after, current)))
        after.sub_(current, alpha=alphas[-1])
        if step:
            after.sub_(basis[(step - 1) % len(basis)], alpha=betas[-1])
        beta = float(after.norm())
        for _ in range(2 if fits else 0):  # twice is enough, and needed only where much was taken away
            before, known = beta, basis[: step + 1]
            after.addmv_(known.T, torch.mv(known, after), alpha=-1)
            beta = float(after.norm())
            if beta > _KEPT * before:
                break
        found = _ritz(alphas, betas, beta, min(k, step + 1), step + 1, tolerance)
        exhausted = beta <= 1e-12 * max(map(abs, (*alphas, *betas)), default=0.0)
        if exhausted or (found.converged and step + 1 >= k):
            break
        betas.append(beta)
        vector = after.div_(beta)
    return found


def _first(objective: Objective, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(objective.size, generator=generator, dtype=objective.dtype)
    return (drawn / drawn.norm()).to(next(iter(objective.parameters.values())).device)


def _ritz(alphas: list[float], betas: list[float], beta: float, k: int, steps: int, tolerance: float) -> Eigenvalues:
    off = torch.tensor(betas, dtype=torch.float64)
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    top = values.flip(0)[:k]
    errors = (beta * vectors[-1].flip(0)[:k]).abs()
    converged = bool((errors <= tolerance * top.abs()).all())
    return Eigenvalues(tuple(top.tolist()), tuple(errors.tolist()), steps, converged)


def hessian_trace(
    objective: Objective,
    *,
    max_probes: int = 100,
    min_probes: int = 10,
    tolerance: float = 0.05,
    seed: int = 0,
    progress: Progress = silent,
) -> Trace:
    """Estimate tr H by the mean of zᵀHz over random signs z, whose variance is 2·Σ_{i≠j} H_ij² for one of them.

    Args:
        objective: The loss at the weights to judge.
        max_probes: Vectors z at most.
        min_probes: Vectors at least; the standard error is an estimate too.
        tolerance: Ends when the standard error is below this share of |tr H|.
        seed: Of the signs.
        progress: Shows how far it is.

    Raises:
        UnsupportedSetup: A value is out of range.
        NonFiniteWeights: The Hessian is not finite.

    Source: Hutchinson, A stochastic estimator of the trace of the influence matrix (1990).
    """
    if not 1 <= min_probes <= max_probes or tolerance < 0:
        raise UnsupportedSetup(
            f"hessian_trace(min_probes={min_probes}, max_probes={max_probes}, tolerance={tolerance}): expected 1 ≤ "
            "min_probes ≤ max_probes, and a tolerance of 0 or more."
        )
    generator = torch.Generator().manual_seed(seed)
    device = next(iter(objective.parameters.values())).device
    found: list[float] = []
    for _ in progress(range(max_probes), "trace", max_probes):
        signs = torch.randint(2, (objective.size,), generator=generator).to(device, objective.dtype) * 2 - 1
        found.append(float(torch.dot(signs, objective.product(signs))))
        mean, error = _mean(found)
        if len(found) >= min_probes and error < tolerance * abs(mean):
            break
    return Trace(*_mean(found), len(found))


def _mean(values: list[float]) -> tuple[float, float]:
    drawn = torch.tensor(values, dtype=torch.float64)
    error = float(drawn.std() / len(values) ** 0.5) if len(values) > 1 else float("inf")
    return float(drawn.mean()), error
