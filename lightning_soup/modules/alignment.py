"""SalsaPPO: PPO for language models, held to a soup of fine-tuned models (SALSA)."""

import copy
import inspect
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.alignment_checks import (
    check_fit,
    check_values,
    check_vocabularies,
    special_tokens,
)
from lightning_soup.modules.causal_lm import Tokens
from lightning_soup.modules.classification import in_a_loop
from lightning_soup.modules.frozen_policies import FrozenPolicies
from lightning_soup.modules.lora import LoRA
from lightning_soup.modules.policy_gradient import (
    controlled_beta,
)
from lightning_soup.modules.ppo import PPO, divergence, listed
from lightning_soup.modules.rewards import RewardModel
from lightning_soup.modules.rollouts import (
    hidden_width,
    model_inputs,
)
from lightning_soup.modules.soup_reference import SoupReference
from lightning_soup.modules.zero_shot import evaluating

__all__ = ["SalsaPPO"]

_STATE = "salsa"  # where checkpoints keep what is no weight


class SalsaPPO(PPO):
    """A causal language model that learns from rewards by PPO and is held to a soup of fine-tuned models.

    Maximises E[r(x, y) − β·KL(π_θ(·|x)‖π_ref(·|x))] over responses y that the policy π_θ writes to prompts x. π_ref
    has the weights Σ_i c_i·θ_i of models that were fine-tuned apart from one start, and never changes. The policy
    starts from one of them, θ_1, **not** from the soup: its KL divergence is above 0 from the first step on, by design.
    Without ``reference`` π_ref is θ_1 itself, which is plain PPO.

    Batches are mappings of prompts, ``input_ids`` and ``attention_mask`` ``[B, P]``, padded on the left;
    :class:`.PromptDataModule` makes them. In each step the policy writes a response to each prompt, and then learns
    from all of them for ``epochs`` passes of ``minibatches`` optimizer steps each: ``trainer.global_step`` counts
    these. Dropout is off everywhere. What is drawn at random depends on the seed and the number of the batch alone, so
    that a resumed training goes on bit by bit.

    Logs, in training and with ``val_`` in validation: ``reward``, the mean score; ``kl``, the divergence from the
    reference in nats a response, by k1; ``objective``, reward − β·kl; ``length``. In training also ``beta``,
    ``policy_loss``, ``value_loss``, ``clipped`` (share of tokens whose ratio left 1 ± ε) and ``entropy``, in
    validation ``kl_start``, the divergence from θ_1: only this can be compared between references, since KL to its own
    soup flatters SALSA. Report, too, what the soup does without any training. θ_1 is what the module's first training
    starts from. A policy that is loaded from a checkpoint and only validated does not know it: then ``val_kl_start`` is
    left out, and without ``reference`` ``val_kl`` and ``val_objective`` are.

    Manual optimization has no ``Trainer(accumulate_grad_batches, gradient_clip_val)``: take ``micro_batches`` and
    ``max_grad_norm``. To compile the networks, call ``module.model.compile()``; transformers' gradient checkpointing
    works in training mode only, and so not here. Checkpoints hold policy and value function, not the reference: what
    it is made of is named there.

    Args:
        model_name: θ_1: a folder of transformers, or a name on the Hugging Face hub (downloaded once).
        model_config: Instead, a new model: ``{model_type: llama, hidden_size: 64, …}``.
        reward: ``reward(sequences, kinds) -> scores``: a function, an object that can be called, or
            :class:`.RewardModel`; see :data:`.Reward`. In YAML the name of a function, or a ``class_path``. One that
            is an ``nn.Module`` is used in evaluation mode, and neither trained nor saved.
        reference: What π_ref is made of; None: θ_1.
        beta: β. If it is large, the policy is taught by the divergence instead of the reward.
        kl_estimator: ``k1`` or ``k3``, see :func:`.kl_to_reference`.
        kl_target: Instead of a fixed β, adapt it so that the divergence becomes so many nats a response. Ask for more
            than the divergence at the start, which is not 0.
        kl_horizon: Responses within which β is adapted.
        max_new_tokens: Tokens of a response at most.
        temperature: That responses are drawn with, and that both policies are compared at.
        epochs: Passes over the responses of a batch.
        minibatches: Optimizer steps in a pass.
        micro_batches: Parts in which a minibatch passes through the model, to save memory; the step is the same.
        gamma: γ.
        lam: λ of generalised advantage estimation.
        epsilon: ε of the ratio's clip.
        epsilon_value: ε_v of the value's clip.
        value_weight: c_v: the loss is that of the policy + c_v times that of the value function.
        value: ``head``: the value function is a linear layer on the policy's last states; ``network``: it has a copy
            of θ_1 of its own under it.
        kl_to_start: Log ``val_kl_start``; without ``reference`` it costs nothing, else a copy of θ_1 in memory.
        lora: Train low-rank adapters only, by peft, on θ_1.
        lr: Learning rate.
        lr_value: Of the value function; then it has an optimizer of its own.
        schedule: ``constant``, or ``linear`` down to 0 at the last batch.
        max_grad_norm: The gradients' norm at most, of each optimizer; None: as it is.
        weight_decay: Of matrices only.
        betas: Of AdamW.
        seed: Of the responses and of the order in which they are learned from.
        generation_config: As of :class:`.CausalLM`; of it the end and padding tokens are used here, nothing else.
        start: θ_1, where ``model_name`` is not given. Checkpoints hold it, so that a training that is resumed by
            ``lightning-soup fit --ckpt_path`` knows what it started from.

    Raises:
        UnsupportedSetup: What :class:`.CausalLM` refuses, or a value out of range; before training: checkpoints that do
            not fit the policy, another vocabulary, a strategy other than one device or DDP, two optimizers under a
            gradient scaler; in training: prompts padded on the right, a reward of the wrong shape.
        NonFiniteScore: A reward is NaN or infinite.
        NonFiniteWeights: A checkpoint of the reference holds NaN.

    Source: Chegini et al., SALSA (arXiv 2411.01798); no official code is known. What of PPO the paper leaves open has
    the defaults of TRL.
    """

    def __init__(
        self,
        model_name: str | None = None,
        model_config: dict[str, Any] | None = None,
        reward: Callable | None = None,  # a `Reward`; what it returns would tell jsonargparse to expect a class of it
        reference: SoupReference | None = None,
        beta: float = 0.05,
        kl_estimator: Literal["k1", "k3"] = "k1",
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        max_new_tokens: int = 64,
        temperature: float = 0.7,
        epochs: int = 4,
        minibatches: int = 1,
        micro_batches: int = 1,
        gamma: float = 1.0,
        lam: float = 0.95,
        epsilon: float = 0.2,
        epsilon_value: float = 0.2,
        value_weight: float = 0.1,
        value: Literal["head", "network"] = "head",
        kl_to_start: bool = True,
        lora: LoRA | None = None,
        lr: float = 3e-6,
        lr_value: float | None = None,
        schedule: Literal["constant", "linear"] = "constant",
        max_grad_norm: float | None = 1.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        seed: int = 0,
        generation_config: dict[str, Any] | None = None,
        start: str | None = None,
    ):
        super().__init__(model_name, model_config, lora, lr, weight_decay, betas, generation_config=generation_config)
        check_values(self.hparams)
        self.starts_elsewhere = model_name is None and start is not None
        self.hparams.update(start=model_name or start)
        self.automatic_optimization = False
        self.beta, self.batches = beta, 0  # β now; how many batches of responses there were
        # In a mapping, since a reward that is a module is neither trained nor saved.
        self._given: dict[str, Any] = {"reward": reward, "reference": reference}
        self._frozen: FrozenPolicies | None = None
        self.value_network = copy.deepcopy(self.policy.base_model) if value == "network" else None
        self.value_head = nn.Linear(hidden_width(self.policy), 1)
        nn.init.zeros_(self.value_head.weight)  # V = 0: it neither draws random numbers, nor begins with a guess
        nn.init.zeros_(self.value_head.bias)

    def save_hyperparameters(self, *args: Any, frame: FrameType | None = None, **options: Any) -> None:
        """All but reward and reference, which are no plain values."""
        frame = frame or inspect.currentframe().f_back
        left_out = ["lora", "reward", "reference"]
        super().save_hyperparameters(*args, frame=frame, **{**options, "ignore": left_out} if not args else options)

    # -------------------------------------------------------------------------------------------------- before training

    def setup(self, stage: str) -> None:
        """Build the reference, and look at everything before a token is written."""
        if stage == "predict":
            return  # logits need neither reward nor reference
        tokenizer = getattr(self.trainer.datamodule, "tokenizer", None)
        reward, reference = self._given["reward"], self._given["reference"]
        check_fit(self.trainer, reward, two_optimizers=self.hparams.lr_value is not None)
        check_vocabularies(self.policy, reference, reward, tokenizer)
        self._ends, self._pad = special_tokens(self.policy, tokenizer)
        if stage == "fit":
            self.beta, self.batches = self.hparams.beta, 0
            if self._frozen is not None:
                self._frozen.models.pop("reference", None)  # it is read anew, and there is one copy at a time
        # Where a trained policy is only validated, θ_1 is not known, unless it was trained just now.
        start = stage == "fit" and (reference is None or self.hparams.kl_to_start)
        self._frozen = FrozenPolicies(self, reference, start, self._frozen)

    def on_fit_start(self) -> None:
        """Bring what is frozen to the device, in the type that the policy has by now."""
        self._place(self.device)

    def on_validation_start(self) -> None:
        """Likewise, where there is no fit."""
        self._place(self.device)

    def on_test_start(self) -> None:
        """Likewise."""
        self._place(self.device)

    def teardown(self, stage: str) -> None:
        """Leave the device, as the module does."""
        if self._frozen is not None:
            self._place(torch.device("cpu"))

    def _place(self, device: torch.device) -> None:
        self._frozen.place(device)
        reward = self._given["reward"]
        if isinstance(reward, (nn.Module, RewardModel)):
            reward.to(device)
        if isinstance(reward, nn.Module):
            reward.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, V]`` of the token after each one, of prompts padded on either side."""
        attention = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.policy(**model_inputs(self.policy, input_ids, attention)).logits

    # ------------------------------------------------------------------------------------------------------- training

    @torch.compiler.disable  # neither writing token by token nor backward passes are a graph
    def training_step(self, batch: Tokens, batch_idx: int) -> None:
        """Write a response to each prompt, and learn from all of them."""
        with evaluating(self):  # without dropout, which would make KL of noise
            rollout, figures = self.rollout(batch, self.seed_of("train", self.batches))
            figures |= self.learn(rollout)
        for schedule in listed(self.lr_schedulers()):
            schedule.step()
        self.batches += 1
        if self.hparams.kl_target is not None:
            ranks = self.trainer.world_size
            kl, responses = float(self._total(figures["kl"])) / ranks, ranks * len(rollout.scores)
            self.beta = controlled_beta(self.beta, kl, self.hparams.kl_target, self.hparams.kl_horizon, responses)
        if in_a_loop(self):
            named = {f"train_{name}": value for name, value in figures.items()}
            self.log_dict(named, batch_size=len(rollout.scores), sync_dist=True)

    # ----------------------------------------------------------------------------------------------------- evaluation

    def validation_step(self, batch: Tokens, batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        """Write responses, the same in every validation as far as the policy is; gives their mean reward."""
        return self._judge("val", batch, batch_idx)

    def test_step(self, batch: Tokens, batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        """The same."""
        return self._judge("test", batch, batch_idx)

    @torch.compiler.disable
    def _judge(self, stage: Literal["val", "test"], batch: Tokens, batch_idx: int) -> Tensor:
        rollout, figures = self.rollout(batch, self.seed_of(stage, batch_idx))
        named = {name: figures[name] for name in ("reward", "kl", "objective", "length") if name in figures}
        log_start = self._frozen.log_probabilities("start", rollout.sequences, rollout.attention, rollout.mask)
        if log_start is not None and self.hparams.kl_to_start:
            named["kl_start"] = divergence(rollout.log_old, log_start, rollout.mask)
        if in_a_loop(self):
            logged = {f"{stage}_{name}": value for name, value in named.items()}
            self.log_dict(logged, batch_size=len(rollout.scores), on_epoch=True, sync_dist=True)
        return figures["reward"]

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep β, the number of batches, and which reference it was. The reference itself is not written."""
        super().on_save_checkpoint(checkpoint)
        reference = self._given["reference"]
        made_of = None if reference is None else reference.plain()
        checkpoint[_STATE] = {
            "beta": self.beta,
            "batches": self.batches,
            "reference": made_of,
            "digest": None if self._frozen is None else self._frozen.digest,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the training was ended.

        Raises:
            UnsupportedSetup: The reference, or θ_1 in its place, is another one now.
        """
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get(_STATE)
        if state is None or self._trainer is None or self._trainer.state.fn != "fit":
            return
        if state["digest"] not in (None, self._frozen.digest):  # None: of a policy that no Trainer has trained
            raise UnsupportedSetup(
                f"The checkpoint was trained with the reference {state['reference'] or 'model_name'}, whose weights "
                f"were {state['digest']}; they are {self._frozen.digest} now. Give the same reference and model_name, "
                "or start anew."
            )
        self.beta, self.batches = state["beta"], state["batches"]
