"""SalsaPPO: the closed optimum of a bandit, what it is held to, resume, accumulation, precision, refusals."""

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from lightning_soup.callbacks import ExpertsWeightAveraging, ExponentialAverage
from lightning_soup.cli.soup_cli import SoupCLI
from lightning_soup.data.prompts import PromptDataModule
from lightning_soup.distributed import ReplicaStrategy
from lightning_soup.errors import NonFiniteScore, NonFiniteWeights, UnsupportedSetup
from lightning_soup.modules.alignment import SalsaPPO
from lightning_soup.modules.alignment_checks import check_fit
from lightning_soup.modules.rollouts import sample, token_log_probabilities, until_end
from lightning_soup.modules.soup_reference import SoupReference
from lightning_soup.weights import open_checkpoint
from tests.helpers.salsa import assert_same, count_digits, data, fit, module, weights_of, write_pair
from tests.helpers.texts import write_model
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:builtin type",
    "ignore:The dirpath has changed",
    "ignore:You're resuming from a checkpoint that ended",
    "ignore:You defined a `validation_step`",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models from one start, and prompts."""
    return write_pair(tmp_path_factory.mktemp("salsa"))


# --------------------------------------------------------------------------------------------------- against theory


class SlowsDown(Callback):
    """Adam at 0.02, then 0.002; keeps the last policies."""

    def __init__(self, batches):
        self.batches, self.policies = batches, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.batches // 2:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] *= 0.1
        if batch_idx >= self.batches - 50:
            self.policies.append(pl_module.model.arms.detach().double().softmax(0))


def bandit(reference, beta, batches=300, seed=0):
    """PPO for r = (0, 1, 0) from the logits (2, 0, 0)."""
    import tests.helpers.bandit  # noqa: F401  (which registers it)

    seed_everything(seed, verbose=False)
    given = [{"arms": torch.tensor(arms), "embedding.weight": torch.zeros(3, 1)} for arms in reference]
    found = SalsaPPO(
        model_config={"model_type": "test_bandit", "vocab_size": 3},
        reward=lambda sequences, kinds: (sequences[:, -1] == 1).float(),
        reference=SoupReference(given),
        beta=beta,
        max_new_tokens=1,
        temperature=1.0,
        epochs=2,
        value_weight=1.0,
        lr=0.02,
        max_grad_norm=None,
    )
    with torch.no_grad():
        found.model.arms.copy_(torch.tensor([2.0, 0.0, 0.0]))
    rows = [{"input_ids": torch.zeros(1, dtype=torch.long)}] * (512 * batches)
    watch = SlowsDown(batches)
    quiet_trainer(max_epochs=1, callbacks=[watch]).fit(found, DataLoader(rows, 512))
    return torch.stack(watch.policies).mean(0)


ONE, TWO = [2.0, 0.0, 0.0], [0.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        pytest.param([ONE], (0.468310531, 0.468310531, 0.063378938), id="one", marks=pytest.mark.slow),
        pytest.param([ONE, TWO], (0.114195199, 0.843794734, 0.042010066), id="soup"),
    ],
)
def test_a_bandit_ends_at_the_optimum_of_its_reference(reference, expected):
    found = bandit(reference, beta=0.5)
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().sum().item() / 2 < 1e-4


def test_without_beta_the_reference_does_not_matter():
    first, second = (bandit(reference, beta=0.0, batches=60) for reference in ([ONE], [TWO, ONE]))
    assert torch.equal(first, second)


def test_the_soup_is_the_reference_and_the_policy_does_not_start_from_it(folder, tmp_path):
    found = module(folder)
    trainer = fit(found, folder, tmp_path, max_epochs=1, limit_train_batches=1)
    a, b = (open_checkpoint(folder / name) for name in "ab")
    held = found._frozen.models["reference"].state_dict()
    for name in a:
        torch.testing.assert_close(held[name], 0.5 * a[name] + 0.5 * b[name])
    for name, value in found._frozen.models["start"].state_dict().items():
        assert torch.equal(value, (a[name] if name in a else a["model.embed_tokens.weight"])), name
    assert trainer.callback_metrics["train_kl"] != 0
    assert not any("reference" in name or "frozen" in name for name in found.state_dict())
    held = {id(parameter) for model in found._frozen.models.values() for parameter in model.parameters()}
    assert not held & {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}


def test_without_a_reference_it_is_plain_ppo(folder, tmp_path):
    class First(Callback):
        kl = None

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.kl = self.kl if self.kl is not None else trainer.callback_metrics["train_kl"].item()

    first = First()
    trainer = fit(module(folder, reference=None), folder, tmp_path, first, max_epochs=3)
    assert first.kl == 0
    assert trainer.callback_metrics["val_kl"] == trainer.callback_metrics["val_kl_start"] != 0


def test_it_learns(folder, tmp_path):
    before = module(folder)
    trainer = quiet_trainer(default_root_dir=tmp_path)
    trainer.validate(before, data(folder), verbose=False)
    reward = trainer.callback_metrics["val_reward"].item()
    found = module(folder, beta=0.01, epochs=4)
    trainer = fit(found, folder, tmp_path, max_epochs=12)
    assert trainer.callback_metrics["val_reward"].item() > reward + 1
    assert trainer.global_step == 12 * 3 * 4
    assert found.batches == 36


# ----------------------------------------------------------------------------------------------- responses, and parts


def test_responses_are_drawn_from_the_policy_alone(folder):
    policy = module(folder).policy.eval()
    policy.generation_config.top_k, policy.generation_config.repetition_penalty = 1, 5.0
    prompts = torch.ones(6000, 1, dtype=torch.long)
    torch.manual_seed(0)
    drawn = sample(policy, prompts, prompts, max_new_tokens=1, temperature=0.5, ends={2}, pad=0)
    with torch.no_grad():
        expected = (policy(prompts[:1]).logits[0, -1] / 0.5).softmax(0)
    found = torch.bincount(drawn[:, 0], minlength=len(expected)) / len(drawn)
    assert (found - expected).abs().sum() / 2 < 0.06  # top-1 would be 0.9 away
    assert policy.generation_config.top_k == 1


def test_padding_on_the_left_changes_no_probability(folder):
    policy = module(folder).policy.eval()
    sequence = torch.tensor([[1, 5, 9, 12, 7]])
    alone, states = token_log_probabilities(policy, sequence, torch.ones_like(sequence), 2, 1.0, hidden=True)
    padded = torch.tensor([[0, 0, 0, 1, 5, 9, 12, 7]])
    beside, more = token_log_probabilities(policy, padded, (padded > 0).long(), 2, 1.0, hidden=True)
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(more, states, rtol=0, atol=1e-5)
    log_p = policy(sequence).logits.log_softmax(-1)
    torch.testing.assert_close(alone[0], torch.stack([log_p[0, 2, 12], log_p[0, 3, 7]]), rtol=0, atol=1e-5)


def test_the_end_token_belongs_to_the_response():
    responses = torch.tensor([[5, 2, 7, 2], [2, 0, 0, 0], [5, 6, 7, 8]])
    assert until_end(responses, {2}).tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert until_end(responses, ()).tolist() == [[1] * 4] * 3
    assert until_end(responses, {2, 7}).tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]


def test_what_a_reward_is_given(folder, tmp_path):
    seen = []

    def reward(sequences, kinds):
        seen.append((sequences, kinds))
        return torch.zeros(len(sequences))

    fit(module(folder, reward=reward), folder, tmp_path, limit_train_batches=1, max_epochs=1)
    sequences, kinds = seen[-1]
    assert sequences.shape == kinds.shape == (8, sequences.shape[1])
    for row, kind in zip(sequences, kinds, strict=True):
        written = row[kind == 2]
        assert 1 <= len(written) <= 6
        assert not (written[:-1] == 2).any()  # the end token stands at the end only
        assert row[kind == 1][0] == 1  # prompts begin with <s>
        order = kind[kind.nonzero()[0].item() :].tolist()
        assert order == [1] * order.count(1) + [2] * order.count(2) + [0] * order.count(0)


@pytest.mark.parametrize("minibatches", [1, 3])
def test_parts_of_a_minibatch_give_the_same_step(folder, tmp_path, minibatches):
    whole, parted = module(folder, minibatches=minibatches), module(folder, minibatches=minibatches, micro_batches=3)
    for each in (whole, parted):
        fit(each, folder, tmp_path, limit_train_batches=2, max_epochs=1, limit_val_batches=0)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parted.state_dict()[name], value, rtol=1e-3, atol=2e-4)


def test_two_optimizers_share_the_parameters(folder, tmp_path):
    found = module(folder, lr_value=1e-3)
    trainer = fit(found, folder, tmp_path, limit_train_batches=1, max_epochs=1)
    policy, value = trainer.optimizers
    own = [id(p) for p in found.value_head.parameters()]
    assert sorted(id(p) for group in value.param_groups for p in group["params"]) == sorted(own)
    assert not set(own) & {id(p) for group in policy.param_groups for p in group["params"]}
    assert {group["lr"] for group in value.param_groups} == {1e-3}
    assert trainer.global_step == 2 * 2


def test_a_value_network_of_its_own_leaves_the_policy_to_its_loss(folder, tmp_path):
    one = module(folder, value="network", value_weight=0.0)
    other = module(folder, value="network", value_weight=1.0, lr_value=0.05)
    for each in (one, other):
        fit(each, folder, tmp_path, limit_train_batches=1, max_epochs=1)
    assert not torch.equal(one.value_head.weight, other.value_head.weight)
    assert_same(weights_of(one.model), weights_of(other.model))  # in the first batch V was 0 for both


def test_a_schedule_ends_at_zero(folder, tmp_path):
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(module(folder, schedule="linear"), folder, tmp_path, Watch(), max_epochs=2)
    assert rates == pytest.approx([1e-2 * (1 - step / 6) for step in range(6)])
    rates.clear()
    fit(module(folder, schedule="linear"), folder, tmp_path, Watch(), max_epochs=-1, max_steps=8)
    assert rates == pytest.approx([1e-2 * (1 - step / 4) for step in range(4)])


def test_beta_adapts_and_is_kept(folder, tmp_path):
    found = module(folder, kl_target=1e-6, kl_horizon=100)
    trainer = fit(found, folder, tmp_path, max_epochs=1, limit_train_batches=2)
    kls = trainer.callback_metrics["train_kl"].item()
    assert kls > 0
    assert found.beta == pytest.approx(0.05 * 1.016**2)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    again = module(folder, kl_target=1e-6, kl_horizon=100)
    fit(again, folder, tmp_path, max_epochs=1, limit_train_batches=2, ckpt_path=tmp_path / "kept.ckpt")
    assert again.beta == found.beta


# --------------------------------------------------------------------------------------------------------- the trainer


class Saves(Callback):
    """After the first epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_resuming_goes_on_bit_by_bit(folder, tmp_path):
    file = tmp_path / "middle.ckpt"

    class InOrder(PromptDataModule):
        def train_dataloader(self):
            return self._loader("train")

    def run(found, *callbacks, ckpt_path=None):
        seed_everything(0, verbose=False)
        trainer = quiet_trainer(callbacks=[*callbacks], max_epochs=2, default_root_dir=tmp_path)
        prompts = InOrder(str(folder / "prompts.jsonl"), str(folder / "a"), batch_size=8, val_fraction=0.25)
        trainer.fit(found, datamodule=prompts, ckpt_path=ckpt_path)

    lora = {"r": 2, "targets": ["q_proj"]}
    for options in (
        {},
        {"lr_value": 1e-3, "kl_target": 0.5, "schedule": "linear"},
        {"value": "network"},
        {"lora": lora},
    ):
        whole, resumed = module(folder, **options), module(folder, **options)
        averages = [ExponentialAverage(decay=0.9), ExponentialAverage(decay=0.9)]
        run(whole, Saves(file), averages[0])
        run(resumed, averages[1], ckpt_path=file)
        assert_same(weights_of(resumed), weights_of(whole))
        assert_same(averages[1].state_dict(), averages[0].state_dict())
        assert resumed.beta == whole.beta
        assert resumed.batches == whole.batches == 6


def test_a_compiled_module_is_the_same(folder, tmp_path):
    short = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0}
    plain, compiled, inside = (module(folder, max_new_tokens=2) for _ in range(3))
    fit(plain, folder, tmp_path, **short)
    fit(torch.compile(compiled, backend="eager"), folder, tmp_path, **short)
    assert_same(weights_of(compiled), weights_of(plain))
    inside.model.compile(backend="eager")
    fit(inside, folder, tmp_path, **short)
    for name, value in weights_of(plain).items():
        torch.testing.assert_close(inside.state_dict()[name], value, rtol=0, atol=1e-3)


def test_another_reference_is_refused_when_resuming(folder, tmp_path):
    trainer = fit(module(folder), folder, tmp_path, max_epochs=1, limit_train_batches=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = module(folder, reference=SoupReference([str(folder / "a"), str(folder / "b")], [0.75, 0.25]))
    with pytest.raises(UnsupportedSetup, match=r"was trained with the reference .*'coefficients': \[0.5, 0.5\]"):
        fit(other, folder, tmp_path, ckpt_path=tmp_path / "x.ckpt")


def test_a_checkpoint_needs_nothing_but_its_file(folder, tmp_path):
    found = module(folder)
    trainer = fit(found, folder, tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = SalsaPPO.load_from_checkpoint(tmp_path / "x.ckpt")
    assert_same(weights_of(loaded), weights_of(found))
    with pytest.raises(UnsupportedSetup, match=r"needs a reward, and has None.*load_from_checkpoint\(path, reward=…\)"):
        quiet_trainer().validate(loaded, data(folder), verbose=False)
    loaded = SalsaPPO.load_from_checkpoint(tmp_path / "x.ckpt", reward=count_digits)
    again = quiet_trainer(default_root_dir=tmp_path)
    again.validate(loaded, data(folder), verbose=False)
    assert again.callback_metrics["val_reward"] == trainer.callback_metrics["val_reward"]
    assert "val_kl_start" not in again.callback_metrics


def reward_of_yaml(sequences, kinds):
    return count_digits(sequences, kinds)


@pytest.mark.parametrize("options", [[], ["--model.lora", "{r: 2, targets: [q_proj]}"]], ids=["whole", "lora"])
def test_from_yaml_and_resumed(folder, tmp_path, monkeypatch, options):
    """Lightning's CLI takes the hyperparameters of the checkpoint, which do not name θ_1 as the model's weights."""
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parents[2] / "configs" / "salsa_ppo.yaml"
    common = [
        *("fit", "--config", str(config), "--model.reward", f"{__name__}.reward_of_yaml", "--model.reference", "null"),
        *("--model.model_name", str(folder / "a"), "--data.tokenizer", str(folder / "a"), "--model.lr", "0.01"),
        *("--data.train", str(folder / "prompts.jsonl"), "--data.batch_size", "8", "--model.max_new_tokens", "4"),
        *("--trainer.accelerator", "cpu", "--trainer.val_check_interval", "1.0", "--trainer.precision", "32-true"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
        *("--trainer.logger", "false", *options),
    ]
    whole = SoupCLI([*common, "--trainer.max_epochs", "2"])
    SoupCLI([*common, "--trainer.default_root_dir", "first"])
    file = next((tmp_path / "first").rglob("last.ckpt"))
    resumed = SoupCLI([*common, "--trainer.max_epochs", "2", "--ckpt_path", str(file)])
    assert resumed.model.hparams.start == str(folder / "a")
    assert resumed.model._frozen.digest == whole.model._frozen.digest
    assert resumed.model.batches == whole.model.batches == 8
    assert resumed.trainer.callback_metrics["val_kl"] != 0
    assert resumed.trainer.callback_metrics["val_kl"] == resumed.trainer.callback_metrics["val_kl_start"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(folder, tmp_path, precision):
    found = module(folder)
    trainer = fit(found, folder, tmp_path, max_epochs=1, precision=precision)
    kept = next(found._frozen.models["reference"].parameters()).dtype
    assert kept == next(found.policy.parameters()).dtype
    assert math.isfinite(trainer.callback_metrics["val_kl"])


def test_a_gradient_scaler(folder, tmp_path):
    """float16 with a scaler on a CPU: steps with an overflow are skipped, and clipping sees unscaled gradients."""
    norms = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(module(folder), folder, tmp_path, Watch(), max_epochs=1, plugins=[plugin], limit_val_batches=0)
    assert max(norms) < 20  # scaled ones would be a thousand times as large
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(UnsupportedSetup, match="two optimizers"):
        fit(module(folder, lr_value=1e-3), folder, tmp_path, max_epochs=1, plugins=[plugin])


def _on_a_rank(folder, tmp_path):
    """One batch of equal prompts on two ranks; gives the weights, and what was logged."""
    found = module(Path(folder), minibatches=2, micro_batches=2)
    trainer = fit(
        found, Path(folder), tmp_path, max_epochs=1, limit_train_batches=2, devices=2, strategy="ddp", accelerator="cpu"
    )
    return {name: value.numpy() for name, value in found.state_dict().items()}, {
        name: value.item() for name, value in trainer.callback_metrics.items()
    }


def test_two_ranks(folder, tmp_path):
    (first, logged), (second, _) = run_on_two_ranks(_on_a_rank, str(folder), str(tmp_path))
    for name, value in first.items():
        assert (value == second[name]).all(), name
    assert math.isfinite(logged["val_kl"])


def _bad_reward_on_rank_one(folder, tmp_path):
    import os

    def reward(sequences, kinds):
        scores = torch.zeros(len(sequences))
        return scores / 0 if os.environ["LOCAL_RANK"] == "1" else scores

    with pytest.raises((UnsupportedSetup, NonFiniteScore)) as caught:
        fit(
            module(Path(folder), reward=reward),
            Path(folder),
            tmp_path,
            max_epochs=1,
            devices=2,
            strategy="ddp",
            accelerator="cpu",
            num_sanity_val_steps=0,
        )
    return str(caught.value)


def test_a_bad_reward_on_one_rank_ends_all(folder, tmp_path):
    other, own = run_on_two_ranks(_bad_reward_on_rank_one, str(folder), str(tmp_path))
    assert "failed on 1 other ranks" in other
    assert "reward gave nan for response 0" in own


class Gradients(Callback):
    """Of the first optimizer step."""

    found = None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.found is None:
            self.found = {name: p.grad.clone().numpy() for name, p in pl_module.named_parameters()}


def _gradients(folder, rows, responses, tmp_path, **options):
    """What a module learns from given responses; on rank r from the rows of that rank."""
    found = module(Path(folder), epochs=1, micro_batches=2, max_grad_norm=None)
    watch = Gradients()
    found.rollout = lambda batch, seed: (responses.part(rows[found.global_rank]), {"kl": torch.tensor(0.0)})
    fit(found, Path(folder), tmp_path, watch, max_epochs=1, limit_train_batches=1, limit_val_batches=0, **options)
    return watch.found


def test_two_ranks_learn_as_one_does_from_all_responses(folder, tmp_path):
    """Whatever the lengths of the responses on each."""
    asked = module(folder)
    fit(asked, folder, tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    with torch.no_grad():
        asked.model.lm_head.weight[2] *= 3  # responses that end
        asked.model.lm_head.weight[2] += 1
    responses, _ = asked.rollout(next(iter(prepared(folder).train_dataloader())), seed=5)
    order = responses.mask.sum(1).argsort()
    assert len(set(responses.mask.sum(1).tolist())) > 1
    one = _gradients(str(folder), [order], responses, tmp_path)
    halves = [order[:4], order[4:]]
    first, second = run_on_two_ranks(
        partial(_gradients, devices=2, strategy="ddp"), str(folder), halves, responses, str(tmp_path)
    )
    for name, expected in one.items():
        assert (first[name] == second[name]).all()
        torch.testing.assert_close(
            torch.from_numpy(first[name]), torch.from_numpy(expected), rtol=1e-3, atol=1e-6, msg=name
        )


def prepared(folder):
    found = data(folder)
    found.setup("fit")
    return found


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0.0\): expected more than 0"),
        ({"kl_estimator": "k2"}, "k2 has a bias"),
        ({"epochs": 0}, r"epochs=0\): expected a whole number above 0"),
        ({"lam": 1.5}, r"lam=1.5\): expected a number in \[0, 1\]"),
        ({"kl_target": 1.0, "beta": 0.0}, "stays 0"),
        ({"value": "network", "lora": {"r": 2, "targets": ["q_proj"]}}, "expected head beside lora"),
        ({"value": "tail"}, "expected head or network"),
        ({"max_grad_norm": 0.0}, "more than 0, or None"),
        ({"beta": -1.0}, "0 or more"),
        ({"beta": math.inf}, "0 or more, finite"),
        ({"value_weight": math.nan}, "0 or more, finite"),
        ({"temperature": math.inf}, "more than 0, finite"),
    ],
)
def test_values_out_of_range(folder, options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        module(folder, **options)


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (None, UnsupportedSetup, "needs a reward"),
        (lambda s, k: torch.full((len(s),), math.nan), NonFiniteScore, "gave nan for response 0 of"),
        (lambda s, k: torch.zeros(len(s), 1), UnsupportedSetup, r"returned the shape \[\d, 1\]; expected \[\d\]"),
        (lambda s, k: torch.zeros(k.shape), UnsupportedSetup, "Scores of single tokens are summed first"),
        (lambda s, k: None, UnsupportedSetup, "returned NoneType"),
        (lambda s, k: [math.inf] * len(s), NonFiniteScore, "gave inf"),
    ],
)
def test_bad_rewards(folder, tmp_path, reward, error, message):
    found = module(folder, reward=reward)
    before = weights_of(found)
    with pytest.raises(error, match=message):
        fit(found, folder, tmp_path)
    assert_same(weights_of(found), before)


def test_lists_of_numbers_are_rewards(folder, tmp_path):
    fit(module(folder, reward=lambda s, k: [1] * len(s)), folder, tmp_path, limit_train_batches=1, max_epochs=1)


def test_other_vocabularies(folder, tmp_path):
    larger = write_model(tmp_path / "larger", vocab_size=90)
    with pytest.raises(UnsupportedSetup, match="larger: has a vocabulary of 90 tokens, the policy of 80"):
        fit(module(folder, reference=SoupReference([str(folder / "a"), str(larger)])), folder, tmp_path)
    import json

    shuffled = write_model(tmp_path / "shuffled", seed=0)
    content = json.loads((shuffled / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (shuffled / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedSetup, match=r"shuffled: its tokenizer is not that of the prompts: 2 tokens differ"):
        fit(module(folder, reference=SoupReference([str(shuffled)])), folder, tmp_path)


def test_references_that_do_not_fit(folder, tmp_path):
    deeper = write_model(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(UnsupportedSetup, match=r"deeper.* does not fit the model, 9 tensors disagree"):
        fit(module(folder, reference=SoupReference([str(deeper)])), folder, tmp_path)
    broken = {name: value.clone() for name, value in open_checkpoint(folder / "a").items()}
    broken["model.norm.weight"][0] = math.nan
    with pytest.raises(NonFiniteWeights, match=r"model\.norm\.weight"):
        fit(module(folder, reference=SoupReference([broken])), folder, tmp_path)
    for checkpoints, coefficients in (("a.ckpt", None), ([], None), (["a", "b"], [1.0]), (["a", "b"], [0.7, 0.7])):
        with pytest.raises(UnsupportedSetup, match="SoupReference"):
            SoupReference(checkpoints, coefficients)


def test_what_is_no_reference():
    for options in ({"checkpoints": Path("a")}, {"checkpoints": {"w": torch.ones(2)}}, {"checkpoints": None}):
        with pytest.raises(UnsupportedSetup, match="expected a list of files or folders"):
            SoupReference(**options)
    with pytest.raises(UnsupportedSetup, match="dtype='int8'"):  # also without coefficients
        SoupReference(["a"], dtype="int8")


def test_prompts_padded_on_the_right(folder, tmp_path):
    rows = [{"input_ids": torch.tensor([1, 5, 0]), "attention_mask": torch.tensor([1, 1, 0])}] * 4
    with pytest.raises(UnsupportedSetup, match="padded on the left"):
        quiet_trainer(max_epochs=1).fit(module(folder), DataLoader(rows, 2))
    with pytest.raises(UnsupportedSetup, match="expected a mapping with input_ids"):
        quiet_trainer(max_epochs=1).fit(module(folder), DataLoader([torch.tensor([1, 5])] * 4, 2))


def test_strategies(folder):
    trainer = SimpleNamespace(strategy=ReplicaStrategy(), precision_plugin=None)
    with pytest.raises(UnsupportedSetup, match="does not work with ReplicaStrategy"):
        check_fit(trainer, count_digits, two_optimizers=False)


def test_experts_are_refused(folder, tmp_path):
    with pytest.raises(UnsupportedSetup, match="does not work with ExpertsWeightAveraging"):
        fit(module(folder), folder, tmp_path, ExpertsWeightAveraging(), max_epochs=1)


def test_a_missing_padding_token_is_no_matter(folder, tmp_path):
    """What follows the end is masked: with other paddings the training is the same."""
    found = []
    for pad in (None, 7):
        each = module(folder)
        each.model.generation_config.pad_token_id = pad
        fit(each, folder, tmp_path, limit_train_batches=2, max_epochs=1)
        found.append(weights_of(each))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-5)
