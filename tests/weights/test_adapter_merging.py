"""Merging adapters: the golden cases, every variant of peft, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_soup.errors import (
    IncompatibleIngredients,
    NonFiniteWeights,
    RecipeError,
    UnreadableCheckpoint,
    UnwritableOutput,
)
from lightning_soup.weights import combine, open_checkpoint
from lightning_soup.weights.adapter_checks import check_adapters
from lightning_soup.weights.adapter_merging import AdapterMerging, save_adapter
from lightning_soup.weights.adapters import WEIGHTS_NAME, config_of, layers_of
from tests.helpers.adapters import PREFIX, VARIANTS, trained, updates, write_adapter

EXACT = {"rtol": 0, "atol": 1e-12}
MODES = ("factor", "exact", "svd")
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def one_layer(tmp_path, *pairs, **config):
    """Adapters of one layer, with A given as rows and B as columns."""
    return [
        open_checkpoint(write_adapter(tmp_path / f"a{i}", {"layer": (f64(a), f64(b))}, **config))
        for i, (a, b) in enumerate(pairs)
    ]


def merged(files, weights, mode, folder, **options):
    """ΔW of the only layer after merging, through the saved folder."""
    terms = AdapterMerging(mode, **options).terms(files, weights)
    return updates(save_adapter(*terms, folder))["layer"]


def linear_of_peft(files, weights):
    """What PEFT's ``add_weighted_adapter(combination_type="linear")`` computes."""
    roots = [(abs(w) * layers_of(file)["layer"].scaling) ** 0.5 for file, w in zip(files, weights, strict=True)]
    pairs = [layers_of(file)["layer"].matrices(file)[1:] for file in files]
    a = sum(root * a for root, (a, _) in zip(roots, pairs, strict=True))
    return sum(root * b for root, (_, b) in zip(roots, pairs, strict=True)) @ a


# --------------------------------------------------------------------------------------------------------- golden cases


def test_g3_factors_differ_from_products_by_their_covariance(tmp_path):
    files = one_layer(tmp_path, ([[1, 2]], [[3], [4]]), ([[1.1, 2]], [[3], [4.2]]))
    weights = (0.25, 0.75)
    exact, factor = (merged(files, weights, mode, tmp_path / mode) for mode in ("exact", "factor"))
    torch.testing.assert_close(exact, f64([[3.225, 6], [4.465, 8.3]]), **EXACT)
    torch.testing.assert_close(factor, f64([[3.225, 6], [4.46125, 8.3]]), **EXACT)
    torch.testing.assert_close(exact - factor, f64([[0, 0], [0.00375, 0]]), **EXACT)
    expected = f64([[5.9529800219, 11.1961524227], [8.1889092363, 15.4014083110]])
    torch.testing.assert_close(linear_of_peft(files, weights), expected, rtol=0, atol=1e-9)


def test_g4_truncation_keeps_the_larger_part(tmp_path):
    files = one_layer(tmp_path, ([[1, 0]], [[2], [0]]), ([[0, 1]], [[0], [4]]))
    halves = (0.5, 0.5)
    exact = merged(files, halves, "exact", tmp_path / "exact")
    torch.testing.assert_close(exact, f64([[1, 0], [0, 2]]), **EXACT)
    factor = merged(files, halves, "factor", tmp_path / "factor")
    torch.testing.assert_close(factor, f64([[0.5, 0.5], [1, 1]]), **EXACT)
    assert float((factor - exact).norm()) == pytest.approx(1.5811388300841898, abs=1e-12)
    with pytest.warns(UserWarning, match="cut to rank 1, which leaves out 45% of it"):
        cut = merged(files, halves, "svd", tmp_path / "svd")
    torch.testing.assert_close(cut, f64([[0, 0], [0, 2]]), **EXACT)
    assert float((cut - exact).norm()) == pytest.approx(1, abs=1e-12)
    whole = merged(files, halves, "svd", tmp_path / "svd2", rank=2)
    torch.testing.assert_close(whole, exact, **EXACT)


def test_g5_products_do_not_depend_on_the_gauge(tmp_path):
    files = one_layer(tmp_path, ([[1, 2]], [[3], [4]]), ([[-1, -2]], [[-3], [-4]]))
    for mode in ("exact", "svd"):
        found = merged(files, (0.5, 0.5), mode, tmp_path / mode)
        torch.testing.assert_close(found, f64([[3, 6], [4, 8]]), **EXACT)
    assert not merged(files, (0.5, 0.5), "factor", tmp_path / "factor").any()
    assert not linear_of_peft(files, (0.5, 0.5)).any()
    with pytest.raises(
        IncompatibleIngredients, match=r"different runs: they have factors A at a median cosine of -1\.00"
    ):
        check_adapters(files, "factor", "require")
    check_adapters(files, "factor", "ignore")
    check_adapters(files, "exact", "require")


def test_g6_copies_of_one_adapter(tmp_path):
    files = one_layer(tmp_path, *[([[1, 2]], [[3], [4]])] * 5)
    for mode in MODES:
        for name, weights in {"equal": (0.2,) * 5, "other": (0.5, 0.25, 0.125, 0.0625, 0.0625)}.items():
            found = merged(files, weights, mode, tmp_path / f"{mode}-{name}")
            torch.testing.assert_close(found, f64([[3, 6], [4, 8]]), **EXACT)
    torch.testing.assert_close(linear_of_peft(files, (0.2,) * 5), f64([[15, 30], [20, 40]]), rtol=0, atol=1e-5)


def test_scalings_are_folded_into_products(tmp_path):
    pair = ([[1, 2], [0, 1]], [[3, 1], [4, 0]])
    files = [
        one_layer(tmp_path / "a", pair, lora_alpha=4)[0],
        one_layer(tmp_path / "b", pair, lora_alpha=4, use_rslora=True)[0],
        one_layer(tmp_path / "c", pair, alpha_pattern={"layer": 6})[0],
    ]
    product = f64(pair[1]) @ f64(pair[0])
    scales = [layers_of(file)["layer"].scaling for file in files]
    assert scales == pytest.approx([2, 4 / 2**0.5, 3])
    for mode, options in (("exact", {}), ("svd", {"rank": 2})):
        found = merged(files, (0.5, 0.3, 0.2), mode, tmp_path / mode, **options)
        torch.testing.assert_close(found, product * (0.5 * scales[0] + 0.3 * scales[1] + 0.2 * scales[2]), **EXACT)
    with pytest.raises(IncompatibleIngredients, match=r"different scalings alpha/r of layer: 2.0 in a0"):
        check_adapters(files, "factor", "require")


# --------------------------------------------------------------------------------------------- every variant, with peft


def saved(tmp_path, variant, seeds=(0, 1), dtype=torch.float32):
    found = []
    for seed in seeds:
        trained(variant, seed, dtype).save_pretrained(tmp_path / f"{variant}-{seed}")
        found.append(open_checkpoint(tmp_path / f"{variant}-{seed}"))
    return found


@every_variant
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_adapter_is_itself(tmp_path, variant):
    [file] = saved(tmp_path, variant, [0])
    for mode in MODES:
        for files, weights in (([file], (1.0,)), ([file, file], (1.0, 0.0))):
            folder = save_adapter(*AdapterMerging(mode).terms(files, weights), tmp_path / mode)
            assert open_checkpoint(folder).digest() == file.digest()
            kept = config_of(open_checkpoint(folder))
            assert kept.pop("inference_mode")
            assert kept == {name: value for name, value in config_of(file).items() if name != "inference_mode"}


@every_variant
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_merged_adapters_load_into_stock_peft(tmp_path, variant):
    from peft import PeftModel

    from tests.helpers.adapters import Network

    files = saved(tmp_path, variant)
    weights = (0.25, 0.75)
    expected = {
        name: sum(w * update[name] for w, update in zip(weights, map(updates, files), strict=True))
        for name in updates(files[0])
    }
    for mode in ("exact", "svd"):
        check_adapters(files, mode, "require")
        rank = {"rank": 2 * max(layer.rank for layer in layers_of(files[0]).values())} if mode == "svd" else {}
        folder = save_adapter(*AdapterMerging(mode, **rank).terms(files, weights), tmp_path / mode)
        torch.manual_seed(7)
        model = PeftModel.from_pretrained(Network(), str(folder)).eval()
        for name, layer in model.base_model.model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                delta = layer.get_delta_weight("default")
                found = (delta.T if name == "embed" else delta).detach().flatten(1).double()
                torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-5)
        held = dict(open_checkpoint(folder))
        mean = combine(files, weights)
        for name in held:
            if name.endswith(".lora_B.bias"):
                s = layers_of(files[0])[name.removeprefix(PREFIX).removesuffix(".lora_B.bias")].scaling
                torch.testing.assert_close(held[name], s * mean[name])
            elif "lora_A" not in name and "lora_B" not in name and "embedding_" not in name:
                assert torch.equal(held[name], mean[name]), name
        model(torch.arange(11))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_fresh_process_loads_it_and_computes_the_mean_update(tmp_path):
    files = saved(tmp_path, "head")
    folder = save_adapter(*AdapterMerging("exact").terms(files, (0.5, 0.5)), tmp_path / "merged")
    script = f"""
import sys, torch
from peft import PeftModel
from tests.helpers.adapters import Network
torch.manual_seed(7)
model = PeftModel.from_pretrained(Network(), {str(folder)!r}).eval()
torch.save((model.base_model.model.first.get_delta_weight("default"), model(torch.arange(11))), sys.argv[1])
"""
    root = Path(__file__).parents[2]  # where the helpers are found, whatever the folder is now
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out.pt")], check=True, cwd=root)
    delta, logits = torch.load(tmp_path / "out.pt", weights_only=True)
    mean = sum(updates(file)["first"] for file in files) / 2
    torch.testing.assert_close(delta.double(), mean, rtol=1e-5, atol=1e-6)
    head = {name: tensor for name, tensor in open_checkpoint(folder).items() if ".head." in name}
    assert torch.equal(head[f"{PREFIX}head.bias"], combine(files, (0.5, 0.5))[f"{PREFIX}head.bias"])
    assert logits.shape == (11, 3)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_epoch_counter_in_a_saved_norm_becomes_the_largest(tmp_path):
    for i, count in enumerate((3, 7)):
        model = trained("head", i)
        with torch.no_grad():
            model.base_model.model.norm.modules_to_save["default"].num_batches_tracked.fill_(count)
        model.save_pretrained(tmp_path / str(i))
    files = [open_checkpoint(tmp_path / str(i)) for i in range(2)]
    for mode in MODES:
        folder = save_adapter(*AdapterMerging(mode).terms(files, (0.5, 0.5)), tmp_path / mode)
        assert open_checkpoint(folder)[f"{PREFIX}norm.num_batches_tracked"] == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_type_is_kept(tmp_path, dtype):
    files = saved(tmp_path, "plain", dtype=dtype)
    for mode in MODES:
        folder = save_adapter(*AdapterMerging(mode).terms(files, (0.5, 0.5)), tmp_path / mode)
        assert {spec.dtype for spec in open_checkpoint(folder).specs.values()} == {dtype}


def test_layers_of_other_ranks_get_patterns_that_fit_them_only(tmp_path):
    one, two = torch.ones(1, 4), torch.ones(2, 4)
    layers = {"a.fc": (one, one.T), "b.a.fc": (two, two.T), "c": (two, two.T)}
    options = {"r": 2, "lora_alpha": 2, "rank_pattern": {"b.a.fc": 2, "a.fc": 1}}
    file = open_checkpoint(write_adapter(tmp_path / "x", layers, **options))
    folder = save_adapter(*AdapterMerging("exact").terms([file, file], (0.5, 0.5)), tmp_path / "y")
    found = open_checkpoint(folder)
    assert {name: layer.rank for name, layer in layers_of(found).items()} == {"a.fc": 2, "b.a.fc": 4, "c": 4}
    assert {layer.scaling for layer in layers_of(found).values()} == {1.0}
    assert config_of(found)["r"] == 4


def test_bin_files_and_adapters_at_step_0(tmp_path):
    folder = write_adapter(tmp_path / "a", {"layer": (torch.ones(1, 2), torch.zeros(2, 1))})
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    other = write_adapter(tmp_path / "b", {"layer": (torch.ones(1, 2), torch.ones(2, 1))})
    files = [open_checkpoint(folder), open_checkpoint(other)]
    for mode in MODES:
        check_adapters(files, mode, "require")
        found = merged(files, (0.5, 0.5), mode, tmp_path / mode)
        torch.testing.assert_close(found, torch.full((2, 2), 0.5, dtype=torch.float64))
    assert not merged(files[:1] * 2, (0.5, 0.5), "svd", tmp_path / "zero").any()


# ------------------------------------------------------------------------------------------------------------ refusals


def pair(tmp_path, first=None, second=None, **both):
    layer = {"layer": (torch.ones(1, 2), torch.ones(2, 1))}
    return [
        open_checkpoint(write_adapter(tmp_path / name, layer, **{**both, **(own or {})}))
        for name, own in (("x", first), ("y", second))
    ]


@pytest.mark.parametrize(
    ("first", "second", "mode", "message"),
    [
        (
            {"base_model_name_or_path": "p"},
            {"base_model_name_or_path": "q"},
            "exact",
            "base models: p in x, q in y.* two names or paths, write one of them into every adapter_config.json",
        ),
        ({"peft_type": "IA3"}, {}, "factor", "kinds of adapters: IA3 in x, LORA in y"),
        ({"use_dora": True}, {}, "svd", "uses of DoRA"),
        ({"lora_alpha": 2}, {}, "factor", r"scalings alpha/r of layer: 2.0 in x, 1.0 in y.*use merge='exact'"),
        ({"init_lora_weights": "pissa"}, {}, "factor", "initialisations that change the base: pissa in x, None in y"),
        ({"init_lora_weights": "olora"}, {"init_lora_weights": "olora"}, "svd", "'olora' changes the base"),
        (*[{"trainable_token_indices": [1]}] * 2, "dense", "trainable_token_indices=.* makes its update another one"),
        ({"use_qalora": True}, {}, "exact", "use_qalora=True makes its update another one"),
        ({"peft_type": "IA3"}, {"peft_type": "IA3"}, "exact", "merge='exact' is for LoRA, this is IA3"),
    ],
)
def test_what_would_be_wrong_is_refused(tmp_path, first, second, mode, message):
    with pytest.raises(IncompatibleIngredients, match=f"(?s){message}"):
        check_adapters(pair(tmp_path, first, second), mode, "require")


def test_one_run_of_pissa_is_averaged_by_factors(tmp_path):
    check_adapters(pair(tmp_path, init_lora_weights="pissa"), "factor", "require")


def test_other_ranks_and_targets(tmp_path):
    one, two = torch.ones(1, 2), torch.ones(2, 2)
    files = {
        "r1": {"layer": (one, one.T)},
        "r2": {"layer": (two, two.T)},
        "other": {"more": (one, one.T), "layer": (one, one.T)},
        "wide": {"layer": (torch.ones(1, 3), one.T)},
    }
    opened = {name: open_checkpoint(write_adapter(tmp_path / name, layers)) for name, layers in files.items()}
    with pytest.raises(IncompatibleIngredients, match="different ranks of layer: 1 in r1, 2 in r2"):
        check_adapters([opened["r1"], opened["r2"]], "factor", "require")
    check_adapters([opened["r1"], opened["r2"]], "svd", "require")
    for mode in MODES:
        with pytest.raises(IncompatibleIngredients, match=r"adapt other layers \(target_modules\): more in one"):
            check_adapters([opened["r1"], opened["other"]], mode, "require")
        with pytest.raises(IncompatibleIngredients, match="of different base models"):
            check_adapters([opened["r1"], opened["wide"]], mode, "require")
    with pytest.raises(IncompatibleIngredients, match="is memory, not an adapter"):
        check_adapters([opened["r1"], open_checkpoint({"w": one})], "factor", "require")


def test_heads_of_other_classes(tmp_path):
    layer = {"layer": (torch.ones(1, 2), torch.ones(2, 1))}
    files = [
        open_checkpoint(write_adapter(tmp_path / str(n), layer, {"head.weight": torch.ones(n, 2)})) for n in (3, 4)
    ]
    for mode in MODES:
        with pytest.raises(IncompatibleIngredients, match="another number of classes"):
            check_adapters(files, mode, "require")


def test_a_config_that_does_not_fit_its_tensors(tmp_path):
    file = open_checkpoint(write_adapter(tmp_path / "a", {"layer": (torch.ones(1, 2), torch.ones(2, 1))}, r=4))
    with pytest.raises(UnreadableCheckpoint, match="adapter_config says rank 4"):
        layers_of(file)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": None}, "lora_alpha=None of 'layer'; expected a number"),
        ({"lora_alpha": "16"}, "lora_alpha='16' of 'layer'; expected a number"),
        ({"alpha_pattern": {"layer": True}}, "lora_alpha=True of 'layer'"),
        ({"r": "1"}, "r='1' of 'layer'; expected a number"),
        ({"rank_pattern": ["layer"]}, r"rank_pattern=\['layer'\]; expected numbers by patterns"),
        ({"rank_pattern": {"layer(": 1}}, r"rank_pattern=.*unterminated subpattern"),
    ],
)
def test_a_config_with_values_of_another_kind(tmp_path, config, message):
    with pytest.raises(UnreadableCheckpoint, match=message):
        check_adapters(pair(tmp_path, **config), "factor", "require")


@pytest.mark.parametrize("shape", [(), (1,)])
def test_factors_that_are_no_matrices(tmp_path, shape):
    folder = write_adapter(tmp_path / "a", {"layer": (torch.ones(1, 2), torch.ones(2, 1))})
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file({**tensors, f"{PREFIX}layer.lora_A.weight": torch.ones(shape)}, folder / WEIGHTS_NAME)
    with pytest.raises(UnreadableCheckpoint, match="They are not of one adapter"):
        layers_of(open_checkpoint(folder))


@pytest.mark.parametrize("mode", MODES)
def test_names_that_peft_does_not_load(tmp_path, mode):
    folder = write_adapter(tmp_path / "a", {"layer": (torch.ones(1, 2), torch.ones(2, 1))})
    tensors = load_file(folder / WEIGHTS_NAME)
    in_memory = {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}
    save_file(in_memory, folder / WEIGHTS_NAME)
    with pytest.raises(UnreadableCheckpoint, match=r"holds '.*layer\.lora_A\.default\.weight', but nothing that ends"):
        check_adapters([open_checkpoint(folder)] * 2, mode, "require")


def test_an_adapter_with_a_head_only(tmp_path):
    folder = write_adapter(tmp_path / "a", {"layer": (torch.ones(1, 2), torch.ones(2, 1))})
    save_file({f"{PREFIX}head.weight": torch.ones(2, 2)}, folder / WEIGHTS_NAME)
    files = [open_checkpoint(folder)] * 2
    check_adapters(files, "factor", "require")
    with pytest.raises(IncompatibleIngredients, match="this is an adapter without layers of LoRA"):
        check_adapters(files, "exact", "require")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "linear"}, "expected one of factor, exact, svd, dense"),
        ({"mode": "exact", "rank": 2}, "for merge='svd' only"),
        ({"mode": "svd", "rank": 0}, "a rank of 1 or more"),
        ({"mode": "dense"}, "needs base"),
        ({"mode": "svd", "base": "x"}, "takes no base"),
    ],
)
def test_options_that_have_no_meaning(options, message):
    with pytest.raises(RecipeError, match=message):
        AdapterMerging(**options)


def test_coefficients_that_have_no_meaning(tmp_path):
    files = pair(tmp_path)
    with pytest.raises(RecipeError, match="one coefficient for each adapter"):
        AdapterMerging("exact").terms(files, {"*": (0.5, 0.5)})
    with pytest.raises(RecipeError, match="all coefficients are zero"):
        AdapterMerging("exact").terms(files, (0.0, 0.0))


def test_folders_are_written_as_a_whole_or_not_at_all(tmp_path):
    files = pair(tmp_path)
    target = tmp_path / "out"
    save_adapter(files, (0.5, 0.5), target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert set(before) == {"adapter_model.safetensors", "adapter_config.json"}
    broken = write_adapter(tmp_path / "nan", {"layer": (torch.full((1, 2), torch.nan), torch.ones(2, 1))})
    with pytest.raises(Exception, match="holds NaN"):
        save_adapter([files[0], open_checkpoint(broken)], (0.5, 0.5), target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    for mode in ("exact", "svd"):
        with pytest.raises(
            NonFiniteWeights, match=r"nan: tensor 'base_model\.model\.layer\.lora_A\.weight'.*holds NaN"
        ):
            AdapterMerging(mode).terms([files[0], open_checkpoint(broken)], (0.5, 0.5))
    save_adapter(files, (1.0, 0.0), target)  # an earlier one is replaced
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan", "out", "x", "y"]
    (target / "notes.txt").write_text("mine")
    with pytest.raises(UnwritableOutput, match=r"holds other files \(notes\.txt\), which would be lost"):
        save_adapter(files, (1.0, 0.0), target)
    save_file({"w": torch.ones(1)}, tmp_path / "file")
    with pytest.raises(UnwritableOutput, match="is a file"):
        save_adapter(files, (1.0, 0.0), tmp_path / "file")
    assert json.loads((target / "adapter_config.json").read_text())["r"] == 1
