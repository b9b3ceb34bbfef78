"""PPO of a causal language model: writing responses to a batch of prompts, and learning from them.

Source: Schulman et al., Proximal Policy Optimization Algorithms (arXiv 1707.06347), with the divergence from a frozen
policy in the reward, as in Ziegler et al., Fine-Tuning Language Models from Human Preferences (arXiv 1909.08593).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_soup.modules.alignment_checks import check_positions, check_prompts
from lightning_soup.modules.causal_lm import CausalLM, Tokens
from lightning_soup.modules.frozen_policies import FrozenPolicies
from lightning_soup.modules.optimization import batches_in_all, parameter_groups
from lightning_soup.modules.policy_gradient import (
    advantages_and_returns,
    kl_to_reference,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from lightning_soup.modules.rewards import agreed_scores
from lightning_soup.modules.rollouts import (
    Rollout,
    fork_rng,
    kinds_of_tokens,
    model_inputs,
    sample,
    token_log_probabilities,
    until_end,
)
from lightning_soup.modules.zero_shot import evaluating

__all__ = ["PPO", "divergence", "listed"]


class PPO(CausalLM):
    """The part of :class:`.SalsaPPO` that knows what a batch is, and not what the training is for.

    A subclass keeps the hyperparameters of :class:`.SalsaPPO`, and sets what stands here before training.

    Attributes:
        value_head: The value function's last layer.
        value_network: The network under it; None: the policy.
        beta: β now.
        batches: How many batches of responses there were.
    """

    value_head: nn.Linear
    value_network: nn.Module | None
    beta: float
    batches: int
    _given: dict[str, Any]  # the reward and what the reference is made of
    _frozen: FrozenPolicies | None
    _ends: set[int]
    _pad: int

    @property
    def policy(self) -> nn.Module:
        """The language model itself, with its adapters where it has some."""
        return self.model if self.hparams.lora is None else self.model.get_base_model()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW for all, or one for the policy and one for the value function."""
        hparams = self.hparams
        groups = parameter_groups(self.policy, hparams.lr, hparams.weight_decay, None)
        valued = [part for part in (self.value_network, self.value_head) if part is not None]
        lr = hparams.lr if hparams.lr_value is None else hparams.lr_value
        more = [
            {**group, "lr": lr} for part in valued for group in parameter_groups(part, lr, hparams.weight_decay, None)
        ]
        split = [groups + more] if hparams.lr_value is None else [groups, more]
        optimizers = [torch.optim.AdamW(each, lr=hparams.lr, betas=hparams.betas) for each in split]
        if hparams.schedule == "constant":
            return optimizers
        batches = batches_in_all(self.trainer, self.steps_per_batch)
        return optimizers, [
            torch.optim.lr_scheduler.LambdaLR(each, lambda batch: max(1 - batch / batches, 0.0)) for each in optimizers
        ]

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps, of all optimizers, that are taken for each batch of prompts."""
        return self.hparams.epochs * self.hparams.minibatches * (1 if self.hparams.lr_value is None else 2)

    def rollout(self, batch: Tokens, seed: int) -> tuple[Rollout, dict[str, Tensor]]:
        """Responses to a batch of prompts, with their rewards and advantages.

        Args:
            batch: The prompts.
            seed: Of what is drawn.

        Returns:
            The responses, and what is logged of them.
        """
        prompts, attention = check_prompts(batch)
        hparams = self.hparams
        check_positions(self.policy, attention, hparams.max_new_tokens)
        with torch.no_grad(), evaluating(self):
            with fork_rng(seed, prompts.device):
                responses = sample(
                    self.policy,
                    prompts,
                    attention,
                    max_new_tokens=hparams.max_new_tokens,
                    temperature=hparams.temperature,
                    ends=self._ends,
                    pad=self._pad,
                )
            mask = until_end(responses, self._ends)
            sequences, attention = torch.cat([prompts, responses], 1), torch.cat([attention, mask], 1)
            log_old, values = self.evaluate(sequences, attention, mask)
            log_ref = self._frozen.log_probabilities("reference", sequences, attention, mask)
            known = log_ref is not None
            log_ref = log_ref if known else log_old  # a trained policy is validated, and θ_1 not known
            # A copy, since the reward may write into what it is given.
            scores = agreed_scores(
                self._given["reward"], sequences.clone(), kinds_of_tokens(attention, mask), self._total
            )
            kl = kl_to_reference(log_old, log_ref, hparams.kl_estimator)
            rewards = token_rewards(kl, scores.to(kl), mask, self.beta)
            advantages, returns = advantages_and_returns(rewards, values, mask, hparams.gamma, hparams.lam)
            whitened = whiten(advantages, mask, self._total)
        figures = {
            "reward": scores.mean(),
            "length": mask.sum(1).float().mean(),
            "beta": torch.tensor(self.beta),
            "entropy": -(log_old * mask).sum() / mask.sum(),
        }
        if known:
            kl = divergence(log_old, log_ref, mask)
            figures |= {"kl": kl, "objective": scores.mean() - self.beta * kl}
        return Rollout(sequences, attention, mask, scores, log_old, log_ref, values, whitened, returns), figures

    def learn(self, rollout: Rollout) -> dict[str, Tensor]:
        """Take the optimizer steps of a batch of responses.

        Returns:
            What is logged of them.
        """
        hparams, optimizers = self.hparams, listed(self.optimizers())
        count = len(rollout.scores)
        generator = torch.Generator().manual_seed(self.seed_of("order", self.batches))
        device = rollout.scores.device
        sums = torch.zeros(4, device=device)
        for _ in range(hparams.epochs):
            order = torch.randperm(count, generator=generator).to(device)
            for rows in order.tensor_split(min(hparams.minibatches, count)):
                tokens = self._total(rollout.mask[rows].sum())
                parts = rows.tensor_split(min(hparams.micro_batches, len(rows)))
                for number, part in enumerate(parts, 1):
                    sums += self._backward(rollout.part(part), tokens, last=number == len(parts))
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        policy, value, clipped, seen = sums
        return {"policy_loss": policy / seen, "value_loss": value / seen, "clipped": clipped / seen}

    def _backward(self, part: Rollout, tokens: Tensor, last: bool) -> Tensor:
        """Add the gradient of some responses, as their share of a minibatch of so many tokens on all ranks."""
        hparams, mask = self.hparams, part.mask
        strategy = self.trainer.strategy
        # DDP exchanges gradients once a step, with the last part.
        waits = nullcontext() if last or not isinstance(strategy, DDPStrategy) else strategy.block_backward_sync()
        with waits:
            log_pi, values = self.evaluate(part.sequences, part.attention, mask)
            of_policy = (policy_loss(log_pi, part.log_old, part.advantages, hparams.epsilon) * mask).sum()
            of_value = (value_loss(values, part.old_values, part.returns, hparams.epsilon_value) * mask).sum()
            # DDP takes the mean over ranks, of sums that are to be added.
            share = self.trainer.world_size / tokens
            self.manual_backward((of_policy + hparams.value_weight * of_value) * share)
        ratio = (log_pi.detach() - part.log_old).exp()
        clipped = (((ratio - 1).abs() > hparams.epsilon) * mask).sum()
        return torch.stack([of_policy.detach(), of_value.detach(), clipped, mask.sum()]).float()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients, which a gradient scaler has brought to their size by now."""
        if self.hparams.max_grad_norm is not None:
            self.clip_gradients(optimizer, self.hparams.max_grad_norm, "norm")

    def evaluate(self, sequences: Tensor, attention: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Give log π_θ of each token of the responses, and V before it, ``[B, T]`` both, 0 after the ends."""
        shared, count = self.value_network is None, mask.shape[1]
        log_pi, states = token_log_probabilities(
            self.policy, sequences, attention, count, self.hparams.temperature, hidden=shared
        )
        if not shared:
            inputs = model_inputs(self.value_network, sequences, attention)
            states = self.value_network(**inputs).last_hidden_state[:, -count - 1 : -1]
        # A token that may never be written has −∞ where it is padding, and −∞·0 is NaN.
        return log_pi.masked_fill(mask == 0, 0.0), self.value_head(states).squeeze(2).to(log_pi) * mask

    def _total(self, value: Tensor) -> Tensor:
        """The sum over ranks."""
        if self._trainer is None or self.trainer.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value.clone(), reduce_op="sum")

    def seed_of(self, purpose: Literal["train", "val", "test", "order"], number: int) -> int:
        """The seed of what is drawn for a batch on this rank."""
        which = ("train", "val", "test", "order").index(purpose)
        # Of a larger number torch's generator on CPUs sees the last 32 bits only.
        parts = [self.hparams.seed % 2**63, which, self.global_rank, number]
        return int(np.random.SeedSequence(parts).generate_state(1)[0])


def divergence(log_pi: Tensor, log_ref: Tensor, mask: Tensor) -> Tensor:
    """The mean over responses of Σ_t k1_t, which estimates KL(π‖π_ref) in nats a response."""
    return (kl_to_reference(log_pi, log_ref) * mask).sum(1).mean()


def listed(found: Any) -> Sequence[Any]:
    """Optimizers or schedulers as Lightning hands them out: none, one, or several."""
    if found is None:
        return []
    return found if isinstance(found, (list, tuple)) else [found]
