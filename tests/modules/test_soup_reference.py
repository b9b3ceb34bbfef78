"""SoupReference: the mean of checkpoints of any format, in one copy, frozen."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.causal_lm import CausalLM, open_language_model
from lightning_soup.modules.soup_reference import SoupReference
from lightning_soup.recipes import UniformSoup
from lightning_soup.weights import open_checkpoint, save_weights
from tests.helpers.adapters import write_adapter
from tests.helpers.texts import sums, write_fine_tune, write_lines, write_model
from tests.helpers.trainers import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:builtin type")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("reference")
    write_fine_tune(place / "b", write_model(place / "a"), size=0.01)
    write_lines(place / "train.jsonl", sums(20))
    return place


def formats(folder, place):
    """One and the same fine-tune in all the forms that users have it in."""
    from lightning_soup.data import TextDataModule

    module = CausalLM(str(folder / "b"))
    trainer = quiet_trainer(max_steps=0, default_root_dir=place)
    trainer.fit(module, datamodule=TextDataModule(str(folder / "train.jsonl"), str(folder / "a")))
    trainer.save_checkpoint(place / "lightning.ckpt")
    torch.save(module.model.state_dict(), place / "raw.pt")
    module.model.save_pretrained(place / "shards", max_shard_size="4KB")
    save_weights(module, place / "module.safetensors")
    return [str(folder / "b"), *(str(place / n) for n in ("lightning.ckpt", "raw.pt", "shards", "module.safetensors"))]


def test_formats(folder, tmp_path):
    digests = set()
    a, b = (open_language_model(str(folder / name)) for name in "ab")
    for form in formats(folder, tmp_path):
        model = open_language_model(str(folder / "a"))
        digests.add(SoupReference([str(folder / "a"), form], [0.25, 0.75]).into(model))
        for value, one, two in zip(model.parameters(), a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(value, 0.25 * one + 0.75 * two)
            assert not value.requires_grad
        assert not any(part.training for part in model.modules())
        assert model.lm_head.weight is model.get_input_embeddings().weight
    assert len(digests) == 1


def test_a_soup_that_is_cooked_already_is_the_same(folder, tmp_path):
    both = [str(folder / "a"), str(folder / "b")]
    soup = UniformSoup().cook(both).save(tmp_path / "soup")
    models = [open_language_model(both[0]) for _ in range(2)]
    assert SoupReference(both).into(models[0]) == SoupReference([str(soup)]).into(models[1])


def test_in_half_the_memory_but_for_what_needs_the_bits(folder):
    model, exact = (open_language_model(str(folder / "a")) for _ in range(2))
    both = [str(folder / "a"), str(folder / "b")]
    SoupReference(both, dtype="bfloat16").into(model)
    SoupReference(both).into(exact)
    for value, other in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(value, other.bfloat16())  # rounded once, at the end
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, exact.model.rotary_emb.inv_freq)


def test_adapters_are_refused_by_name(folder, tmp_path):
    place = write_adapter(tmp_path / "adapter", {"layer": (torch.ones(2, 4), torch.ones(3, 2))})
    with pytest.raises(UnsupportedSetup, match=r"adapter is an adapter, and a reference has whole weights. Merge"):
        SoupReference([str(place)]).into(open_language_model(str(folder / "a")))


PROGRAM = """
import sys, threading, time
import torch
from torch import nn
from lightning_soup.modules.soup_reference import SoupReference
def memory():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.fill_(1.0)
SoupReference([{"w": torch.ones(9)}]).into(nn.ParameterDict({"w": torch.zeros(9)}))
before, peak, done = memory(), [0], False
def watch():
    while not done:
        peak.append(memory())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
SoupReference(sys.argv[1:]).into(model)
done = True
thread.join()
print(max(peak) - before)
"""


def test_there_is_one_copy_in_memory(tmp_path):
    """Of three files of 67 MB nothing but the sum, which takes the place of the model's own weights."""
    for number in range(3):
        weights = {f"{i}.weight": torch.full((1024, 1024), float(number)) for i in range(16)}
        save_file(weights, tmp_path / f"{number}.safetensors")
    files = [str(tmp_path / f"{number}.safetensors") for number in range(3)]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *files], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16e6


def test_plain_values_tell_what_it_is_made_of(folder):
    reference = SoupReference([str(folder / "a"), str(folder / "b")], [0.4, 0.6])
    assert reference.plain() == {
        "checkpoints": [str(folder / "a"), str(folder / "b")],
        "coefficients": [0.4, 0.6],
        "dtype": None,
    }
    held = SoupReference([open_checkpoint(folder / "a"), {"w": torch.ones(2)}]).plain()
    assert held["coefficients"] == [0.5, 0.5]
    assert all(isinstance(name, str) for name in held["checkpoints"])
