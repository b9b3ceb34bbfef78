"""A report on invented models with the shape of the demo's: no training, the same numbers anywhere."""

from dataclasses import replace

import torch

from lightning_soup.evaluation.outcomes import Outcome
from lightning_soup.recipes.ingredient import Ingredient
from lightning_soup.recipes.recipe import Soup, Trial
from lightning_soup.runs.report import Entry, SoupReport

SIZES = {"uci_test": 630, "corrupted": 3780, "mnist": 1000}
# Accuracies of the scale of a small ViT fine-tuned on another domain: its fine-tuned end, and its start.
TUNED = {"uci_test": 0.947, "corrupted": 0.668, "mnist": 0.765}
START = {"uci_test": 0.595, "corrupted": 0.43, "mnist": 0.96}


def outcome(name, accuracy, seed, size=None):
    """An outcome of this accuracy. Some images are harder than others, so models err on the same ones."""
    size = size or SIZES.get(name, 500)
    shared = torch.Generator().manual_seed(len(name))
    targets = torch.randint(0, 10, (size,), generator=shared)
    ease = torch.rand(size, generator=shared)
    own = torch.Generator().manual_seed(seed)
    noisy = ease + 0.08 * torch.randn(size, generator=own)
    right = noisy < torch.quantile(noisy, accuracy)
    logits = torch.randn(size, 10, generator=own)
    wrong = (targets + 1 + torch.randint(0, 9, (size,), generator=own)) % 10
    return Outcome(logits.scatter(1, torch.where(right, targets, wrong)[:, None], 6.0), targets)


def outcomes(shift, seed, tests, base=TUNED):
    """Outcomes on all test sets, `shift` above the base on the first and ever more on the following."""
    return {n: outcome(n, base.get(n, 0.7) + shift * (1 + i), seed) for i, n in enumerate(tests)}


TENSORS = {"cls_token": 4, "blocks.0.attn.weight": 40, "blocks.1.attn.weight": 40, "head.weight": 10}


def trial(label, score, kept=None, reason="", **values):
    return Trial(label, score, kept, reason, values)


def soup(recipe, names, coefficients, score=None, history=(), mode="max", source=None):
    """A soup as `Recipe.cook` returns it, of ingredients with a few numbers for weights."""

    def ingredient(i, name):
        weights = {tensor: torch.full((size,), float(i)) for tensor, size in TENSORS.items()}
        made = Ingredient(weights, {"val_acc": 0.9}, 100, label=name)
        return made if source is None else replace(made, source=source)

    ingredients = tuple(ingredient(i, name) for i, name in enumerate(names))
    return Soup(recipe, ingredients, coefficients, score, metric_of(mode), mode, tuple(history))


def metric_of(mode):
    return "val_acc" if mode == "max" else "val_loss"


def entries(k=8, tests=SIZES, init=True, curve=True, label="run-{}-lr{:.1e}", mode="max"):
    """An init, k ingredients, four soups, an ensemble and a curve; mode "min": negated losses."""
    base = 0.0 if mode == "max" else -1.0
    names = [label.format(i, 8e-4 * (1 + i % 4 / 2)) for i in range(k)]
    start, end = "pre-trained on MNIST", "uniform soup"
    found = [Entry(start, "init", outcomes(0, 99, tests, START), base + 0.6)] if init else []
    for i, name in enumerate(names):
        rank = (i * 5) % 7
        hparams = {
            "optimizer": {"lr": 8e-4 * (1 + i % 4 / 2), "weight_decay": 0.01},
            "epochs": (18, 24)[i % 2],
        }
        made = outcomes(0.002 * (rank - 3), i, tests)
        score, digest = base + 0.94 + 0.002 * rank, f"xxh3-128:{i:032x}"
        found.append(Entry(name, "ingredient", made, score, hparams=hparams, digest=digest))
    cooked = [
        (end, soup("UniformSoup", names, (1 / k,) * k, base + 0.956, mode=mode), 0.012),
        ("greedy soup", greedy(names, base, mode), 0.004),
        ("learned soup, per tensor", learned(names, base, mode), 0.010),
    ]
    if curve:
        cooked.append(("WiSE-FT, α = 0.9", interpolated(start, end, base, mode), 0.009))
        for a in range(11):
            mixed = {
                n: START[n] + (TUNED[n] + 0.012 * (1 + i) - START[n]) * (a / 10) ** (2 if n == "mnist" else 0.6)
                for i, n in enumerate(tests)
            }
            made = outcomes(0, 99 if a == 0 else 200 if a == 10 else 300, tests, mixed)
            found.append(Entry("WiSE-FT curve", "interpolation", made, base + 0.9, alpha=a / 10))
    for number, (name, made, shift) in enumerate(cooked):
        path = f"out/{name.split()[0]}.safetensors"
        results = outcomes(shift, 200 + number, tests)
        found.append(Entry(name, "soup", results, made.score, soup=made, path=path))
    found.append(Entry("logit ensemble", "ensemble", outcomes(0.014, 250, tests), base + 0.962))
    return found


def greedy(names, base, mode):
    scores = [0.955, 0.952, 0.958, 0.949, 0.958, 0.941, 0.9611, 0.953]
    best, tried, kept = 0.0, [], []
    for i, name in enumerate(names):
        score = scores[i % 8]
        keep = score >= best
        reason = f"{best:.4f} → {score:.4f}" if tried else "best single ingredient"
        tried.append(trial(name, base + score, keep, reason, distance=0.2 + 0.01 * i))
        if keep:
            best = score
            kept.append(i)
    coefficients = tuple(1 / len(kept) if i in kept else 0.0 for i in range(len(names)))
    return soup("GreedySoup", names, coefficients, base + best, tried, mode)


def learned(names, base, mode):
    generator = torch.Generator().manual_seed(0)
    rows = {t: tuple(torch.softmax(torch.randn(len(names), generator=generator), 0).tolist()) for t in TENSORS}
    tried = [trial(f"epoch {i}", None, None, f"loss {0.4 / i:.4f}", loss=0.4 / i, beta=1 + i / 50) for i in range(1, 6)]
    return soup("LearnedSoup(per_tensor=True)", names, rows, base + 0.958, tried, mode)


def interpolated(start, end, base, mode):
    scores = [0.6 + 0.36 * (a / 10) ** 0.5 - (0.006 if a == 10 else 0) for a in range(11)]
    tried = [trial(f"α = {a / 10}", base + s, a == 9, alpha=a / 10) for a, s in enumerate(scores)]
    return soup("InterpolatedSoup", [start, end], (0.1, 0.9), base + scores[9], tried, mode)


def fake_report(**options):
    mode = options.get("mode", "max")
    return SoupReport(
        "Soups of eight ViTs fine-tuned on handwritten digits",
        entries(**options),
        metric=metric_of(mode),
        mode=mode,
        notes=["corrupted: six corruptions of every test image."],
        commands=["lightning-soup demo --seed 0"],
        samples=300,
    )
