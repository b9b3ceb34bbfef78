"""A rollout and its first gradient against slow loops without padding, over families of models; rewards; seeds."""

import copy
import inspect
import math

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.alignment import SalsaPPO
from lightning_soup.modules.policy_gradient import controlled_beta
from lightning_soup.modules.rollouts import fork_rng, position_limit, sample
from lightning_soup.modules.soup_reference import SoupReference
from tests.helpers.salsa import fit, module, weights_of, write_pair
from tests.helpers.trainers import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
VOCABULARY = 24
COMMON = {"vocab_size": VOCABULARY, "num_attention_heads": 2, "num_hidden_layers": 2, "eos_token_id": 2}
ROPE = {**COMMON, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 32}
OPT = {"model_type": "opt", **COMMON, "hidden_size": 16, "ffn_dim": 32, "max_position_embeddings": 32}
FAMILIES = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "eos_token_id": 2,
    },
    "llama, several ends": {"model_type": "llama", **ROPE, "num_key_value_heads": 1, "eos_token_id": [2, 3, 5]},
    "mistral": {"model_type": "mistral", **ROPE, "num_key_value_heads": 1, "sliding_window": 4},
    "bloom": {"model_type": "bloom", "vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "opt": {**OPT, "word_embed_proj_dim": 8, "do_layer_norm_before": False},  # as opt-350m: its states are projected
}
OPTIONS = {"beta": 0.3, "temperature": 0.7, "gamma": 0.9, "lam": 0.8, "value_weight": 0.5}


def some_prompts():
    """Eight of unequal length, padded on the left."""
    generator, rows = torch.Generator().manual_seed(0), []
    for length in (3, 5, 1, 6, 2, 4, 6, 3):
        tokens = torch.randint(6, VOCABULARY, (length,), generator=generator)
        padding = torch.zeros(6 - length, dtype=torch.long)
        rows.append(
            {"input_ids": torch.cat([padding, tokens]), "attention_mask": (torch.arange(6) >= 6 - length).long()}
        )
    return rows


def reward(sequences, kinds):
    """Something that differs between responses, and does not see padding."""
    return (sequences * kinds).float().sum(1) % 7 / 3


def slow_gradients(found, reference, rollout, options):
    """Of the first step, from each prompt and its response alone; and the log-probabilities and advantages."""
    width, rows = rollout.sequences.shape[1] - rollout.mask.shape[1], []
    temperature = options["temperature"]
    for b in range(len(rollout.scores)):
        prompt = rollout.sequences[b, :width][rollout.attention[b, :width] == 1]
        response = []
        for token in rollout.sequences[b, width:].tolist():
            response.append(token)
            if token in found._ends:
                break
        sequence = torch.cat([prompt, torch.tensor(response)])[None]
        result = found.policy(input_ids=sequence, output_hidden_states=True, use_cache=False)
        log_p = (result.logits[0] / temperature).log_softmax(-1)
        with torch.no_grad():
            log_q = (reference(input_ids=sequence, use_cache=False).logits[0] / temperature).log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) - 1 + len(response))
        chosen = [log_p[place, token] for place, token in zip(places, response, strict=True)]
        values = [found.value_head(result.hidden_states[-1][0, place])[0] for place in places]
        k = [(log_p - log_q)[place, token].item() for place, token in zip(places, response, strict=True)]
        k = [math.exp(-each) - 1 + each for each in k] if options["kl_estimator"] == "k3" else k
        rewards = [-options["beta"] * each for each in k]
        rewards[-1] += rollout.scores[b].item()
        advantages, ahead, value_ahead = [], 0.0, 0.0
        for t in reversed(range(len(response))):
            delta = rewards[t] + options["gamma"] * value_ahead - values[t].item()
            ahead, value_ahead = delta + options["gamma"] * options["lam"] * ahead, values[t].item()
            advantages.insert(0, ahead)
        rows.append((chosen, values, advantages))
    every = [each for _, _, advantages in rows for each in advantages]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((each - mean) ** 2 for each in every) / (len(every) - 1) + 1e-8)
    loss = torch.tensor(0.0)
    for chosen, values, advantages in rows:
        for log_pi, value, advantage in zip(chosen, values, advantages, strict=True):
            ratio = (log_pi - log_pi.item()).exp()
            loss = loss - ratio * (advantage - mean) / deviation
            loss = loss + options["value_weight"] / 2 * (value - (advantage + value.item())) ** 2
    (loss / len(every)).backward()
    whitened = [[(each - mean) / deviation for each in advantages] for _, _, advantages in rows]
    return {name: p.grad for name, p in found.named_parameters()}, [row[0] for row in rows], whitened


class First(Callback):
    """The gradients of the first step."""

    gradients = None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = self.gradients or {name: p.grad.clone() for name, p in pl_module.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_slow_loops(family):
    options = {**OPTIONS, "kl_estimator": "k3" if family == "bloom" else "k1"}
    torch.manual_seed(0)
    config = {**FAMILIES[family], **({"eos_token_id": 2} if family == "bloom" else {})}
    found = SalsaPPO(
        model_config=config, reward=reward, max_new_tokens=7, epochs=1, micro_batches=3, max_grad_norm=None, **options
    )
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    reference = copy.deepcopy(found.policy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    found._given["reference"] = SoupReference([reference.state_dict()])
    before, kept, rollout = copy.deepcopy(found).eval(), [], found.rollout
    found.rollout = lambda batch, seed: kept.append(rollout(batch, seed)) or kept[-1]
    first = First()
    trainer = quiet_trainer(max_epochs=1, callbacks=[first], limit_val_batches=0)
    trainer.fit(found, DataLoader(some_prompts(), 8))
    written = kept[0][0]
    before._ends = found._ends
    gradients, log_pi, advantages = slow_gradients(before, reference.eval(), written, options)
    lengths = [len(row) for row in log_pi]
    assert written.mask.sum(1).tolist() == lengths
    assert len(set(lengths)) > 1 or "llama" not in family  # some end early
    for b, length in enumerate(lengths):
        assert written.log_old[b, :length].tolist() == pytest.approx([each.item() for each in log_pi[b]], abs=1e-4)
        assert written.advantages[b, :length].tolist() == pytest.approx(advantages[b], abs=1e-4)
        assert not written.log_old[b, length:].any()
        assert not written.advantages[b, length:].any()
    for name, expected in gradients.items():
        torch.testing.assert_close(first.gradients[name], expected, rtol=1e-3, atol=1e-4, msg=name)


def test_tokens_that_may_never_be_written():
    """What follows the end may have the probability 0: it is masked, and no NaN."""
    found = SalsaPPO(model_config={**FAMILIES["gpt2"], "pad_token_id": 0}, reward=reward, max_new_tokens=7, lr=1e-3)
    forward = found.policy.forward

    def never_zero(*args, **options):
        result = forward(*args, **options)
        result.logits = result.logits.index_fill(-1, torch.tensor(0), -math.inf)
        result.logits = result.logits + 3 * torch.nn.functional.one_hot(torch.tensor(2), VOCABULARY)
        return result

    never_zero.__signature__ = inspect.signature(forward)
    found.policy.forward = never_zero
    lengths = []
    found._given["reward"] = lambda sequences, kinds: (
        lengths.extend((kinds == 2).sum(1).tolist()) or reward(sequences, kinds)
    )
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(found, DataLoader(some_prompts(), 8))
    assert len(set(lengths)) > 1
    assert all(value.isfinite().all() for value in found.state_dict().values())
    assert math.isfinite(trainer.callback_metrics["train_kl"])


def test_positions(tmp_path):
    """A table of positions ends; on a GPU it would be an assertion of the device."""
    found = SalsaPPO(model_config={**FAMILIES["gpt2"], "n_positions": 12}, reward=reward, max_new_tokens=7)
    assert position_limit(found.policy) == 12
    with pytest.raises(UnsupportedSetup, match=r"A prompt of 6 tokens and max_new_tokens=7 are more than the 12 posit"):
        quiet_trainer(max_epochs=1).fit(found, DataLoader(some_prompts(), 8))
    found = SalsaPPO(model_config={**FAMILIES["gpt2"], "n_positions": 12}, reward=reward, max_new_tokens=6)
    quiet_trainer(max_epochs=1, limit_val_batches=0).fit(found, DataLoader(some_prompts(), 8))
    for family in ("mistral", "bloom"):  # which compute them
        assert position_limit(SalsaPPO(model_config=FAMILIES[family]).policy) is None


# --------------------------------------------------------------------------------------------------- rewards and seeds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models from one start, and prompts."""
    return write_pair(tmp_path_factory.mktemp("rollouts"))


SHORT = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0}


def test_a_reward_may_write_into_what_it_is_given(folder, tmp_path):
    def spoils(sequences, kinds):
        scores = sequences[:, -1].float()
        sequences.fill_(0)
        kinds.fill_(0)
        return scores

    trained = []
    for given in (spoils, lambda sequences, kinds: sequences[:, -1].float()):
        found = module(folder, reward=given)
        fit(found, folder, tmp_path, **SHORT)
        trained.append(weights_of(found))
    for name, value in trained[0].items():
        assert torch.equal(trained[1][name], value), name


def test_a_module_as_reward(folder, tmp_path):
    """It is used in evaluation mode, and neither trained nor saved."""

    class Scores(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.modes = torch.nn.Linear(1, 1), []

        def forward(self, sequences, kinds):
            self.modes.append(self.training)
            return self.layer(kinds.float().sum(1, keepdim=True))[:, 0]

    scores = Scores()
    before = weights_of(scores)
    found = module(folder, reward=scores)
    trainer = fit(found, folder, tmp_path, **SHORT)
    assert set(scores.modes) == {False}
    assert all(torch.equal(value, before[name]) for name, value in scores.state_dict().items())
    own = {id(p) for p in scores.parameters()}
    assert not own & {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not own & {id(p) for p in found.parameters()}


def test_seeds(folder, tmp_path, monkeypatch):
    """Each seed, purpose, rank and batch has draws of its own, also on CPUs, whose generators see 32 bits."""
    found, draws = {seed: module(folder, seed=seed) for seed in (0, 1, -1, 2**32, 20_261_128, 2**62)}, []
    for each in found.values():
        for purpose in ("train", "val", "test", "order"):
            for number in (0, 1, 2**22):
                generator = torch.Generator().manual_seed(each.seed_of(purpose, number))
                draws.append(torch.randint(2**60, (1,), generator=generator).item())
    monkeypatch.setattr(SalsaPPO, "global_rank", 1)
    draws.append(
        torch.randint(2**60, (1,), generator=torch.Generator().manual_seed(found[0].seed_of("train", 0))).item()
    )
    monkeypatch.undo()
    assert len(set(draws)) == len(draws)
    trained = [weights_of(found[seed]) for seed in (0, 1) if fit(found[seed], folder, tmp_path, **SHORT)]
    assert any(not torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_validation_draws_nothing_of_the_training(folder):
    """And two validations draw the same."""
    found = module(folder)
    prompts, drawn = torch.ones(16, 3, dtype=torch.long), []
    for purpose in ("train", "val", "val"):
        with fork_rng(found.seed_of(purpose, 0), prompts.device):
            drawn.append(
                sample(found.policy, prompts, prompts, max_new_tokens=6, temperature=1.0, ends={2}, pad=0).tolist()
            )
    assert drawn[0] != drawn[1] == drawn[2]


def test_beta_keeps_its_sign():
    """Where a batch has more responses than the horizon."""
    assert controlled_beta(0.1, 0.0, 1.0, 10, 1000) == pytest.approx(0.08)
    assert controlled_beta(0.1, 9.0, 1.0, 10, 1000) == pytest.approx(0.12)
