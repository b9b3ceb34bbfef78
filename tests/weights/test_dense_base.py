"""Adapters added to their base: equal to what peft merges, for bases of every name and form."""

import pytest
import torch
from torch import nn

from lightning_soup.errors import IncompatibleIngredients
from lightning_soup.weights import combine, open_checkpoint, save_weights
from lightning_soup.weights.adapter_checks import check_adapters
from lightning_soup.weights.adapter_merging import AdapterMerging
from lightning_soup.weights.adapters import adapter_in, plain_config
from lightning_soup.weights.formats import ADAPTER_KEY, LIGHTNING_VERSION
from tests.helpers.adapters import VARIANTS, Network, trained, write_adapter

WEIGHTS = (0.25, 0.75)


def base_file(path, prefix=""):
    torch.manual_seed(7)
    save_weights({prefix + name: value for name, value in Network().state_dict().items()}, path)
    return str(path)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_base_gets_the_mean_of_what_peft_merges(tmp_path, variant, prefix):
    models, adapters = [trained(variant, seed) for seed in range(2)], []
    for seed, model in enumerate(models):
        model.save_pretrained(tmp_path / str(seed))
        adapters.append(open_checkpoint(tmp_path / str(seed)))
    check_adapters(adapters, "dense", "require")
    merging = AdapterMerging("dense", base=base_file(tmp_path / "base.safetensors", prefix))
    found = combine(*merging.terms(adapters, WEIGHTS))
    whole = [model.merge_and_unload().state_dict() for model in models]
    expected = combine([{prefix + name: value for name, value in state.items()} for state in whole], WEIGHTS)
    assert set(found) == set(expected)
    for name, value in expected.items():
        if "norm.running" in name or "num_batches" in name:
            continue
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_layers_that_no_adapter_touches_stay_as_they_are(tmp_path):
    base = base_file(tmp_path / "base.safetensors")
    trained("plain").save_pretrained(tmp_path / "a")
    terms = AdapterMerging("dense", base=base).terms([open_checkpoint(tmp_path / "a")], (1.0,))
    found, before = combine(*terms), open_checkpoint(base)
    changed = {name for name, value in found.items() if not torch.equal(value, before[name])}
    assert changed == {"first.weight", "second.weight"}


def test_fan_in_fan_out(tmp_path):
    a, b = torch.randn(2, 3), torch.randn(5, 2)
    folder = write_adapter(tmp_path / "a", {"fc": (a, b)}, fan_in_fan_out=True)
    save_weights({"fc.weight": torch.zeros(3, 5)}, tmp_path / "base.safetensors")
    terms = AdapterMerging("dense", base=str(tmp_path / "base.safetensors")).terms([open_checkpoint(folder)], (1.0,))
    torch.testing.assert_close(combine(*terms)["fc.weight"], (b @ a).T)


def lightning_file(path, model):
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    content = {LIGHTNING_VERSION: "2.4.0", "state_dict": state, "hyper_parameters": {"lora": {"r": 2}, "lr": 0.1}}
    torch.save({**content, ADAPTER_KEY: plain_config(model.peft_config["default"])}, path)
    return open_checkpoint(path)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_of_a_whole_model_is_adapter_and_base_at_once(tmp_path, variant):
    model = trained(variant)
    file = lightning_file(tmp_path / "last.ckpt", model)
    model.save_pretrained(tmp_path / "folder")
    adapter, saved = adapter_in(file), open_checkpoint(tmp_path / "folder")
    extra = {name for name in saved if ".modules_to_save." in name or ".original_module." in name}  # of bias="all"
    assert set(adapter) == set(saved) - extra
    assert all(torch.equal(adapter[name], saved[name]) for name in adapter)
    [base, added], rows = AdapterMerging("dense", base=str(tmp_path / "last.ckpt")).terms([adapter], (1.0,))
    assert base.metadata["hyper_parameters"] == {"lora": None, "lr": 0.1}
    found = combine([base, added], rows)
    expected = model.merge_and_unload().state_dict()
    assert set(found) == {f"model.{name}" for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(found[f"model.{name}"], value, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_added_to(tmp_path):
    adapter = open_checkpoint(write_adapter(tmp_path / "a", {"fc": (torch.ones(1, 2), torch.ones(3, 1))}))
    for number, (weight, message) in enumerate(
        {
            "quantised": (torch.ones(6, 1, dtype=torch.uint8), "quantised, and cannot be added to"),
            "float8": (torch.ones(3, 2).to(torch.float8_e4m3fn), "quantised"),
            "shape": (torch.ones(3, 4), r"but the adapters change \[3, 2\]"),
        }.values()
    ):
        path = tmp_path / f"{number}.safetensors"
        save_weights({"fc.weight": weight}, path)
        with pytest.raises(IncompatibleIngredients, match=message):
            AdapterMerging("dense", base=str(path)).terms([adapter], (1.0,))
    save_weights({"other.weight": torch.ones(3, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(IncompatibleIngredients, match=r"not the base of a: it has no weight of the adapted layer 'fc'"):
        AdapterMerging("dense", base=str(tmp_path / "other.safetensors")).terms([adapter], (1.0,))


def test_a_base_that_ties_an_adapted_tensor_to_one_that_stays(tmp_path):
    embed = torch.randn(4, 2)
    torch.save({"embed.weight": embed, "head.weight": embed, "fc.weight": torch.ones(3, 2)}, tmp_path / "tied.pt")
    torch.save({"embed.weight": embed, "head.weight": embed.clone()}, tmp_path / "apart.pt")
    factors = (torch.randn(1, 2), torch.randn(4, 1))

    def merged(name, layers, base, tensors=None):
        adapter = open_checkpoint(write_adapter(tmp_path / name, layers, tensors))
        return combine(*AdapterMerging("dense", base=str(tmp_path / base)).terms([adapter], (1.0,)))

    for name, layers, head in (("a", {"head": factors}, None), ("b", {"fc": (torch.ones(1, 2), torch.ones(3, 1))}, 1)):
        with pytest.raises(
            IncompatibleIngredients, match=r"ties 'embed.weight' and 'head.weight', but .* 'head.weight' al"
        ):
            merged(name, layers, "tied.pt", head and {"head.weight": torch.ones(4, 2)})
    both = merged("c", {"embed": factors, "head": factors}, "tied.pt")
    torch.testing.assert_close(both["embed.weight"], embed + factors[1] @ factors[0])
    assert torch.equal(both["embed.weight"], both["head.weight"])
    apart = merged("d", {"head": factors}, "apart.pt")
    assert torch.equal(apart["embed.weight"], embed)
    torch.testing.assert_close(apart["head.weight"], embed + factors[1] @ factors[0])


def test_a_base_that_holds_the_layers_twice(tmp_path):
    adapter = open_checkpoint(write_adapter(tmp_path / "a", {"fc": (torch.ones(1, 2), torch.ones(3, 1))}))

    def merged(*names):
        save_weights({name: torch.zeros(3, 2) for name in names}, tmp_path / "base.safetensors")
        return combine(*AdapterMerging("dense", base=str(tmp_path / "base.safetensors")).terms([adapter], (1.0,)))

    with pytest.raises(
        IncompatibleIngredients, match=r"holds the layers of a twice, under 'student\.' and 'teacher\.'"
    ):
        merged("student.fc.weight", "teacher.fc.weight")
    found = merged("model.fc.weight", "model.visual.fc.weight")  # the outer one is the adapter's
    assert {name: bool(value.any()) for name, value in found.items()} == {
        "model.fc.weight": True,
        "model.visual.fc.weight": False,
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_attention_that_peft_adapts_as_a_whole(tmp_path):
    from peft import LoraConfig, get_peft_model

    network = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)})
    save_weights(network.state_dict(), tmp_path / "base.safetensors")
    get_peft_model(network, LoraConfig(r=2, target_modules=["attn"])).save_pretrained(tmp_path / "a")
    merging = AdapterMerging("dense", base=str(tmp_path / "base.safetensors"))
    with pytest.raises(IncompatibleIngredients, match="adapts 'attn', torch's MultiheadAttention, as a whole"):
        merging.terms([open_checkpoint(tmp_path / "a")], (1.0,))
