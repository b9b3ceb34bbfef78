"""What SalsaPPO logs, against the same by hand; its optimizers; the tokens that it goes by."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from lightning_soup.modules.alignment_checks import special_tokens
from tests.helpers.salsa import fit, module, write_pair

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models from one start, and prompts."""
    return write_pair(tmp_path_factory.mktemp("figures"))


def watched(found):
    """The rollouts of a module, as they are made."""
    kept, rollout = [], found.rollout
    found.rollout = lambda batch, seed: _kept(kept, rollout(batch, seed))
    return kept


def _kept(kept, made):
    kept.append(made[0])
    return made


def mean(values, mask):
    return ((values * mask).sum() / mask.sum()).item()


class Passes(Callback):
    """Log-probabilities and values at each step, which is a pass."""

    def __init__(self, kept):
        self.kept, self.seen = kept, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        with torch.no_grad():
            rollout = self.kept[-1]
            self.seen.append(pl_module.evaluate(rollout.sequences, rollout.attention, rollout.mask))


def test_figures_of_training(folder, tmp_path):
    found = module(folder, epochs=3, lr=0.02, epsilon=0.1, epsilon_value=0.02, beta=0.3)
    kept = watched(found)
    passes = Passes(kept)
    options = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0}
    logged = fit(found, folder, tmp_path, passes, **options).callback_metrics
    (rollout,) = kept
    mask = rollout.mask
    kl = ((rollout.log_old - rollout.log_ref) * mask).sum(1).mean().item()
    expected = {
        "reward": rollout.scores.mean().item(),
        "kl": kl,
        "objective": rollout.scores.mean().item() - 0.3 * kl,
        "length": mask.sum(1).float().mean().item(),
        "entropy": -mean(rollout.log_old, mask),
        "beta": 0.3,
    }
    shares, of_policy, of_value = [], [], []
    for log_pi, values in passes.seen:
        ratio = (log_pi - rollout.log_old).exp()
        shares.append(mean(((ratio < 0.9) | (ratio > 1.1)).float(), mask))
        worse = torch.minimum(rollout.advantages * ratio, rollout.advantages * ratio.clamp(0.9, 1.1))
        of_policy.append(-mean(worse, mask))
        near = rollout.old_values + (values - rollout.old_values).clamp(-0.02, 0.02)
        errors = torch.maximum((values - rollout.returns) ** 2, (near - rollout.returns) ** 2)
        of_value.append(mean(errors / 2, mask))
    assert len(shares) == 3
    assert shares[0] == 0 < shares[2]
    assert (passes.seen[2][1] - rollout.old_values).abs().max() > 0.02  # values were clipped, too
    expected |= {"clipped": sum(shares) / 3, "policy_loss": sum(of_policy) / 3, "value_loss": sum(of_value) / 3}
    assert {name.removeprefix("train_") for name in logged} == set(expected)
    for name, value in expected.items():
        assert logged[f"train_{name}"].item() == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_figures_of_validation(folder, tmp_path):
    """Means over all responses, with batches of five and three; each with draws of its own."""
    found = module(folder, beta=0.3)
    kept = watched(found)
    options = {"max_epochs": 1, "limit_train_batches": 1, "num_sanity_val_steps": 0}
    logged = fit(found, folder, tmp_path, data_options={"batch_size": 5}, **options).callback_metrics
    judged, kls, starts = kept[1:], [], []
    assert [len(rollout.scores) for rollout in judged] == [5, 3]
    for rollout in judged:
        kls += ((rollout.log_old - rollout.log_ref) * rollout.mask).sum(1).tolist()
        log_start = found._frozen.log_probabilities("start", rollout.sequences, rollout.attention, rollout.mask)
        starts += ((rollout.log_old - log_start) * rollout.mask).sum(1).tolist()
    scores = torch.cat([rollout.scores for rollout in judged]).mean().item()
    expected = {
        "reward": scores,
        "kl": sum(kls) / 8,
        "objective": scores - 0.3 * sum(kls) / 8,
        "kl_start": sum(starts) / 8,
        "length": sum(int(rollout.mask.sum()) for rollout in judged) / 8,
    }
    assert len(set(expected.values())) == 5
    for name, value in expected.items():
        assert logged[f"val_{name}"].item() == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_options_of_the_optimizers(folder, tmp_path):
    given = {"weight_decay": 0.3, "betas": (0.5, 0.6), "lr_value": 0.04, "value": "network"}
    trainer = fit(module(folder, **given), folder, tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    for optimizer, lr in zip(trainer.optimizers, (1e-2, 0.04), strict=True):
        for group in optimizer.param_groups:
            assert (group["lr"], tuple(group["betas"])) == (lr, (0.5, 0.6))
            matrices = {parameter.ndim > 1 for parameter in group["params"]}
            assert matrices == {group["weight_decay"] == 0.3}
            assert group["weight_decay"] in (0, 0.3)


def test_gradients_are_clipped(folder, tmp_path):
    """Of each optimizer by itself, also where a pass has several steps."""
    hooked = []
    found = module(folder, max_grad_norm=1e-3, lr_value=1e-3, minibatches=2)

    def norm(optimizer, *_):
        grads = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        hooked.append(torch.stack(grads).norm().item())

    class Attach(Callback):
        def on_train_start(self, trainer, pl_module):
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(norm)

    fit(found, folder, tmp_path, Attach(), max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    assert len(hooked) == 2 * 2 * 2
    assert max(hooked) == pytest.approx(1e-3, rel=1e-2)


def test_special_tokens(folder):
    policy = module(folder).policy

    def found(generation=(), config=(), tokenizer=()):
        sources = [SimpleNamespace(**dict(given)) for given in (generation, config, tokenizer)]
        known = SimpleNamespace(
            generation_config=sources[0], config=sources[1], get_input_embeddings=policy.get_input_embeddings
        )
        return special_tokens(known, sources[2] if tokenizer else None)

    end, pad = "eos_token_id", "pad_token_id"
    assert found({end: [3, 4], pad: 5}, {end: 6, pad: 7}, {end: 8, pad: 9}) == ({3, 4}, 5)
    assert found({end: None}, {end: 6, pad: 7}, {end: 8, pad: 9}) == ({6}, 7)
    assert found({}, {}, {end: 8}) == ({8}, 8)
    assert found({end: 50_256}, {end: 80}, {}) == (set(), 0)  # of larger vocabularies
    assert found({end: [79, 80]}, {}, {}) == ({79}, 79)
