"""`lightning-soup federated`: simulate federated averaging on one data set, split over clients that come and go."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, seed_everything

from lightning_soup.distributed.fedau import FedAU
from lightning_soup.distributed.federated_average import FederatedAverage
from lightning_soup.distributed.federated_baselines import (
    MIFA,
    AverageAll,
    AverageParticipating,
    FedVARP,
    KnownParticipation,
)
from lightning_soup.distributed.federated_client import evaluate_locally
from lightning_soup.distributed.federated_data import client_parts
from lightning_soup.distributed.federated_simulation import FederatedSimulation
from lightning_soup.distributed.participation_clients import whole_number
from lightning_soup.distributed.participation_patterns import Bernoulli, Cyclic, Markov, dirichlet_participation
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.own_loops import no_notices
from lightning_soup.weights import save_weights

__all__ = ["federated"]

_PATTERNS = {"Bernoulli": Bernoulli, "Markov": Markov, "Cyclic": Cyclic}
Rule = Literal["FedAU", "AverageParticipating", "AverageAll", "KnownParticipation", "MIFA", "FedVARP"]


def federated(
    model: Callable[[], LightningModule],
    data: LightningDataModule,
    rule: Rule = "FedAU",
    cutoff: int | None = 50,
    server_lr: float = 1.0,
    rounds: int = 200,
    local_steps: int = 5,
    clients: int = 20,
    classes: int = 10,
    concentration: float = 0.1,
    preference: float = 0.1,
    mean_rate: float = 0.1,
    least_rate: float = 0.02,
    pattern: Literal["Bernoulli", "Markov", "Cyclic"] = "Bernoulli",
    arrival: float = 0.05,
    period: int = 100,
    seed: int = 0,
    evaluate_every: int = 20,
    folder: str = "runs/federated",
    trainer: dict[str, Any] | None = None,
) -> None:
    """Simulate federated averaging: the training data are split over clients by labels, which also decide who comes.

    The same command goes on where it was ended. Written to the folder: federated.safetensors, the state, and at the end
    weights.safetensors, the global weights.

    Args:
        model: The LightningModule, by class_path and init_args.
        data: The LightningDataModule; its validation data judge the global weights.
        rule: What the server makes of the updates.
        cutoff: FedAU's K, null for none.
        server_lr: η.
        rounds: In all.
        local_steps: I, optimizer steps of a client in a round.
        clients: N.
        classes: C, the labels in the data.
        concentration: Of Dir(·), from which each client's mix of labels is drawn: the smaller, the more they differ.
        preference: Concentration of the labels' availability: the smaller, the more it differs.
        mean_rate: The mean rate of participation.
        least_rate: The least.
        pattern: How clients come and go.
        arrival: Of Markov, the probability that an absent client comes: the smaller, the longer clients stay on or off.
        period: Of Cyclic, in rounds.
        seed: Of the model, the split, the availability and the training.
        evaluate_every: Rounds between two evaluations.
        folder: Where everything goes.
        trainer: Options of the clients' Trainers.

    Raises:
        UnsupportedSetup: An option is out of range, or the folder holds another run.
    """
    whole_number(evaluate_every, "evaluate_every", 1)
    whole_number(rounds, "rounds", 0)
    if seed >= 2**32:
        raise UnsupportedSetup(f"seed={seed}: expected an integer from 0 to {2**32 - 1}.")
    found = dirichlet_participation(
        clients,
        classes,
        concentration=concentration,
        preference=preference,
        mean_rate=mean_rate,
        least=least_rate,
        seed=seed,
    )
    own = {"Markov": {"arrival": arrival}, "Cyclic": {"period": period}}
    with no_notices():
        seed_everything(seed, verbose=False)
        module = model()
        simulation = FederatedSimulation(
            module,
            client_parts(data, found.mixes, seed),
            _rule(rule, found.rates.tolist(), cutoff, server_lr),
            _PATTERNS[pattern](found.rates, seed=seed, **own.get(pattern, {})),
            local_steps=local_steps,
            seed=seed,
            folder=folder,
            trainer=trainer,
        )
        told = f"{clients} clients with rates {found.rates.min():.2f} to {found.rates.max():.2f}"
        sys.stdout.write(f"{told}; {simulation.round} of {rounds} rounds are done.\n")

        def tell(run: FederatedSimulation) -> None:
            if run.round % evaluate_every == 0 or run.round == rounds:
                judged = evaluate_locally(copy.deepcopy(module), data, run.weights, trainer=trainer)
                sys.stdout.write(_line(run, judged.metrics, evaluate_every))

        simulation.run(rounds, on_round=tell)
    path = save_weights(module, Path(folder) / "weights.safetensors")
    sys.stdout.write(f"Written: {path}\n")


def _rule(name: Rule, rates: list[float], cutoff: int | None, lr: float) -> FederatedAverage:
    if name == "FedAU":
        return FedAU(len(rates), cutoff, lr)
    if name == "KnownParticipation":
        return KnownParticipation(dict(enumerate(rates)), lr)
    kinds = {kind.__name__: kind for kind in (AverageParticipating, AverageAll, MIFA, FedVARP)}
    return kinds[name](len(rates), lr)


def _line(run: FederatedSimulation, metrics: dict[str, float], last: int) -> str:
    rows = run.history[-last:]
    came = sum(row["participants"] for row in rows) / len(rows)
    told = [f"{came:.1f} clients a round", *(f"{name} {value:.4g}" for name, value in metrics.items())]
    if "weight_max" in rows[-1]:
        told.append(f"weights {rows[-1]['weight_min']:.3g} to {rows[-1]['weight_max']:.3g}")
    return f"round {run.round}: {', '.join(told)}\n"
