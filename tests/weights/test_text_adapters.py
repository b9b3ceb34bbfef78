"""Adapters of transformers' models: layers stored the other way round, tied embeddings, a head of a task."""

import pytest
import torch

from lightning_soup.weights import combine, open_checkpoint, save_weights
from lightning_soup.weights.adapter_checks import check_adapters
from lightning_soup.weights.adapter_merging import AdapterMerging, save_adapter
from lightning_soup.weights.adapters import config_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TOKENS = torch.tensor([[1, 5, 9, 3], [2, 2, 7, 0]])


def model(kind):
    from transformers import GPT2Config

    torch.manual_seed(3)
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0)
    return kind(config).eval()


def adapters(tmp_path, kind, task):
    from peft import LoraConfig, get_peft_model

    options = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["c_attn", "c_proj"],
        "task_type": task,
        "fan_in_fan_out": True,
    }
    found = []
    for seed in range(2):
        torch.manual_seed(11)
        adapted = get_peft_model(model(kind), LoraConfig(**options))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(tmp_path / f"checkpoint-{seed}")
        found.append(adapted)
    return found, [open_checkpoint(tmp_path / f"checkpoint-{seed}") for seed in range(2)]


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_text_model_gets_the_mean_update(tmp_path, task):
    import transformers
    from peft import PeftModel

    kind = transformers.GPT2LMHeadModel if task == "CAUSAL_LM" else transformers.GPT2ForSequenceClassification
    adapted, files = adapters(tmp_path, kind, task)
    weights = (0.25, 0.75)
    base = save_weights(model(kind), tmp_path / "base.safetensors")
    check_adapters(files, "dense", "require")
    dense = combine(*AdapterMerging("dense", base=str(base)).terms(files, weights))
    mean = combine([one.merge_and_unload().state_dict() for one in adapted], weights)
    assert set(dense) == set(mean)
    for name, value in mean.items():
        torch.testing.assert_close(dense[name], value, rtol=1e-5, atol=1e-6)
    whole = model(kind)
    whole.load_state_dict(dense)
    folder = save_adapter(*AdapterMerging("exact").terms(files, weights), tmp_path / "merged")
    assert config_of(open_checkpoint(folder))["task_type"] == task
    loaded = PeftModel.from_pretrained(model(kind), str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, whole(TOKENS).logits, rtol=1e-4, atol=1e-5)
