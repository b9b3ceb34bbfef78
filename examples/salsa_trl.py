"""A soup as the frozen reference of TRL's trainers, where preference tuning is done at scale.

    pip install -e ".[llm]"
    python examples/salsa_trl.py

Two fine-tuned folders become one with

    lightning-soup soup --ingredients sft_1 sft_2 --output reference

which transformers loads like any other, tokenizer included. TRL takes a reference in two ways: ``DPOTrainer`` has an
argument for it; ``GRPOTrainer`` and ``RLOOTrainer`` build their own from the policy's name, so the soup takes its place
before ``train()``. TRL had a PPOTrainer too, with ``ref_model=``, until it was removed in 2026: for PPO use
:class:`lightning_soup.SalsaPPO`. Leave ``sync_ref_model`` off: it would write over the soup.

Here all of it is tiny and made on the spot: a two-layer Llama over characters, two fine-tunes on sums, preferences for
right sums. ``--sft A B`` takes folders of your own. Half a minute on one core.
"""

import argparse
import os
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from a second thread

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from lightning_soup import open_checkpoint
from lightning_soup.cli.main import main as lightning_soup_command

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_strategy": "no"}
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def sums(seed: int, count: int) -> list[tuple[str, str, str]]:
    """Sums with their right and a wrong answer."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(5, (count, 3), generator=generator).tolist()
    return [(f"{a}+{b}=", str(a + b), str((a + b + c + 1) % 10)) for a, b, c in numbers]


def write_base(folder: Path) -> str:
    """A tiny Llama over single characters, with its tokenizer."""
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = AutoConfig.for_model("llama", vocab_size=len(words), max_position_embeddings=64, **LLAMA, **special)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def fine_tune(base: str, seed: int, folder: Path) -> str:
    """Supervised fine-tuning by TRL."""
    rows = [{"prompt": question, "completion": right} for question, right, _ in sums(seed, 64)]
    arguments = SFTConfig(str(folder), num_train_epochs=4, learning_rate=3e-3, seed=seed, **QUIET)
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = SFTTrainer(base, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(folder))
    return str(folder)


def soup(folders: list[str], output: Path) -> str:
    """The command, as one would type it."""
    lightning_soup_command(["soup", "--ingredients", *folders, "--output", str(output)])
    return str(output)


def dpo(policy: str, reference: str, work: Path) -> None:
    """DPO with the soup as its reference, by the argument."""
    rows = [{"prompt": question, "chosen": right, "rejected": wrong} for question, right, wrong in sums(9, 32)]
    frozen = AutoModelForCausalLM.from_pretrained(reference)
    before = open_checkpoint(frozen).digest()
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(policy),
        ref_model=frozen,
        args=DPOConfig(str(work / "dpo"), num_train_epochs=2, learning_rate=1e-3, beta=0.1, **QUIET),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    loss = trainer.train().training_loss
    assert open_checkpoint(frozen).digest() == before, "the reference has moved"
    print(f"DPO from {Path(policy).name}, held to the soup: loss {loss:.3f}")


def grpo(policy: str, reference: str, work: Path) -> None:
    """GRPO with the soup in the place of the reference that it builds itself."""
    answers = {question: right for question, right, _ in sums(9, 32)}

    def right_sum(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        return [float(said == answers[asked]) for asked, said in zip(prompts, completions, strict=True)]

    trainer = GRPOTrainer(
        policy,
        reward_funcs=right_sum,
        args=GRPOConfig(
            str(work / "grpo"),
            num_train_epochs=1,
            learning_rate=1e-3,
            beta=0.05,  # without it there is no reference
            num_generations=4,
            max_completion_length=4,
            **QUIET,
        ),
        train_dataset=Dataset.from_list([{"prompt": question} for question in answers]),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    frozen = AutoModelForCausalLM.from_pretrained(reference)
    trainer.ref_model.load_state_dict(frozen.state_dict())  # the one that is prepared for the device already
    loss = trainer.train().training_loss
    assert open_checkpoint(trainer.ref_model).digest() == open_checkpoint(frozen).digest(), "the reference has moved"
    print(f"GRPO from {Path(policy).name}, held to the soup: loss {loss:.3f}")


def main() -> None:
    """Cook the reference, and hand it to two trainers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", nargs=2, metavar="FOLDER", help="two fine-tunes of one model")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as found:
        work = Path(found)
        folders = options.sft
        if folders is None:
            base = write_base(work / "base")
            folders = [fine_tune(base, seed, work / f"sft_{seed}") for seed in (1, 2)]
        reference = soup(folders, work / "reference")
        dpo(folders[0], reference, work)
        if options.sft is None:  # whose reward knows the sums
            grpo(folders[0], reference, work)


if __name__ == "__main__":
    main()
