"""Metrics-weighted averaging: the golden weights, windows, what is refused, and adapters from files alone."""

import json
import math
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from lightning_soup.cli.main import main
from lightning_soup.errors import IncompatibleIngredients, RecipeError, UnreadableCheckpoint, UnwritableOutput
from lightning_soup.recipes import (
    Ingredient,
    MetricsWeightedSoup,
    UniformSoup,
    gather_ingredients,
    recook,
)
from lightning_soup.recipes.metrics_weighted import metric_weights
from lightning_soup.weights import combine, open_checkpoint, save_weights
from lightning_soup.weights.adapters import config_of, is_adapter
from tests.helpers.adapters import trained, updates, write_adapter
from tests.helpers.linear_evaluator import LinearEvaluator

LOSSES, STEPS = (0.9, 0.6, 0.5), (100, 200, 400)


@pytest.mark.parametrize(
    ("values", "mode", "scheme", "penalty", "expected"),
    [
        (LOSSES, "min", "linear", 0.8, (0.1, 0.4, 0.5)),
        (LOSSES, "min", "linear", 1, (0, 3 / 7, 4 / 7)),
        (LOSSES, "min", "linear", 0, (1 / 3, 1 / 3, 1 / 3)),
        (STEPS, "max", "linear", 1, (0, 0.25, 0.75)),
        (STEPS, "max", "linear", 0.8, (0.12, 0.28, 0.6)),
        (STEPS, "max", "power", 1, (1 / 7, 2 / 7, 4 / 7)),
        (LOSSES, "min", "power", 1, (0.232558139535, 0.348837209302, 0.418604651163)),
        (LOSSES, "min", "softmax", 2, (0.077695579149, 0.348207427884, 0.574096992968)),
        ((0.7, 0.7, 0.7, 0.7), "min", "power", 3, (0.25,) * 4),
        ((-1.0,), "min", "linear", 1, (1.0,)),
    ],
)
def test_golden_weights(values, mode, scheme, penalty, expected):
    assert metric_weights(values, penalty, scheme, mode) == pytest.approx(expected, abs=1e-12)


def test_linear_tells_losses_apart_that_power_does_not():
    close = (0.50, 0.48, 0.47)
    assert metric_weights(close, 0.7) == pytest.approx((0.145, 0.371, 0.484), abs=5e-4)
    assert metric_weights(close, 1.0, "power") == pytest.approx((0.322, 0.335, 0.343), abs=5e-4)


def test_linear_weights_are_exact_fractions():
    penalty, losses = Fraction(7, 10), [Fraction(n, 100) for n in (91, 57, 60, 52)]
    bad = [(loss - min(losses)) / (max(losses) - min(losses)) for loss in losses]
    raw = [1 - penalty * b for b in bad]
    found = metric_weights([float(loss) for loss in losses], float(penalty))
    assert found == pytest.approx([float(x / sum(raw)) for x in raw], abs=1e-15)


def test_shift_and_scale_do_not_matter_and_power_does_not_overflow():
    base = metric_weights(LOSSES, 0.6)
    assert metric_weights([10 * loss - 40 for loss in LOSSES], 0.6) == pytest.approx(base, abs=1e-12)
    assert metric_weights([1e-300, 2e-300], 50.0, "power") == pytest.approx((1, 2**-50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": 1.1}, r"penalty=1\.1, scheme='linear': expected a number in \[0, 1\]"),
        ({"penalty": -0.1, "scheme": "softmax"}, "a finite number of 0 or more"),
        ({"penalty": math.nan, "scheme": "power"}, "a finite number of 0 or more"),
        ({"penalty": math.inf, "scheme": "power"}, "a finite number of 0 or more"),
        ({"scheme": "cubic"}, "expected one of linear, power, softmax"),
        ({"mode": "best"}, "expected 'min' or 'max'"),
        ({"window": 0}, "expected 1 or more"),
        ({"stride": 0}, "expected 1 or more"),
        ({"merge": "linear"}, "expected one of factor, exact, svd, dense"),
        ({"rank": 4}, "give merge"),
        ({"merge": "dense"}, "needs base"),
    ],
)
def test_options_that_have_no_meaning(options, message):
    with pytest.raises(RecipeError, match=message):
        MetricsWeightedSoup(**options)


def test_power_needs_positive_metrics():
    with pytest.raises(RecipeError, match=r"needs positive metrics, got -0\.5"):
        metric_weights([-0.5, 1.0], 1, "power")


# ------------------------------------------------------------------------------------------------------ whole models


def models(count=6, **metrics):
    torch.manual_seed(2)
    base = torch.randn(4, 8)
    return [
        Ingredient(
            {"w": base + 0.1 * torch.randn(4, 8)}, {"train_loss": 1 - 0.1 * i, **metrics}, 10 * (i + 1), label=f"m{i}"
        )
        for i in range(count)
    ]


def test_the_window_is_counted_back_from_the_last_step():
    shuffled = [models()[i] for i in (3, 0, 5, 1, 4, 2)]
    soup = MetricsWeightedSoup(window=3, stride=2, penalty=1.0).cook(shuffled)
    assert [item.name for item in soup.ingredients] == ["m1", "m3", "m5"]
    assert soup.coefficients == pytest.approx((0, 1 / 3, 2 / 3))
    assert [trial.kept for trial in soup.history] == [False, True, True]
    assert soup.history[2].reason == "train_loss 0.5, weight 0.6667"
    assert soup.notes == ("MetricsWeightedSoup weighed 3 of 6 checkpoints by train_loss (min).",)
    everything = MetricsWeightedSoup(stride=2).cook(shuffled)
    assert [item.name for item in everything.ingredients] == ["m1", "m3", "m5"]
    assert torch.equal(soup.weights()["w"], combine([i.weights for i in soup.ingredients], soup.coefficients)["w"])


def test_by_step_and_by_accuracy():
    by_step = MetricsWeightedSoup("step", penalty=1.0, window=3).cook(models())
    assert by_step.coefficients == pytest.approx((0, 1 / 3, 2 / 3))
    best = [Ingredient(item.source, {"val_acc": acc}) for item, acc in zip(models(2), (0.5, 0.7), strict=True)]
    assert MetricsWeightedSoup("val_acc", penalty=1.0).cook(best).coefficients == (0.0, 1.0)
    assert MetricsWeightedSoup("val_acc", "min", penalty=1.0).cook(best).coefficients == (1.0, 0.0)


def test_one_checkpoint_is_its_own_soup():
    for given, options in ((models(1), {}), (models(), {"window": 1})):
        soup = MetricsWeightedSoup(**options).cook(given)
        assert soup.coefficients == (1.0,)
        assert torch.equal(soup.weights()["w"], given[-1].weights["w"])


def test_equal_metrics_give_the_plain_mean():
    given = [Ingredient(item.source, {"train_loss": 0.5}) for item in models(3)]
    found = MetricsWeightedSoup(penalty=1.0).cook(given)
    assert found.coefficients == UniformSoup().cook(given).coefficients


def test_an_evaluator_scores_the_soup_once():
    torch.manual_seed(0)
    x = torch.randn(30, 4)
    evaluator = LinearEvaluator(x, (x @ torch.ones(4)).sign())
    losses = (0.9, 0.6, 0.5)
    given = [Ingredient({"w": torch.ones(4) + 0.1 * torch.randn(4)}, {"train_loss": loss}) for loss in losses]
    soup = MetricsWeightedSoup().cook(given, evaluator)
    assert soup.score == evaluator.score(soup.weights())
    assert len(evaluator.scored) == 2


@pytest.mark.parametrize(
    ("change", "recipe", "message"),
    [
        ({"metrics": {}}, {}, r"m2: its 'train_loss' is not known \(known are: none\)"),
        ({"metrics": {"val_acc": 1.0}}, {}, r"m2: its 'train_loss' is not known \(known are: val_acc\)"),
        ({"metrics": {"train_loss": math.nan}}, {}, "m2: its 'train_loss' is nan, so it cannot be weighed"),
        ({"metrics": {"train_loss": math.inf}}, {}, "m2: its 'train_loss' is inf"),
        ({"step": None}, {"metric": "step"}, "m2: its 'step' is not known"),
        ({}, {"window": 7}, "window=7 with stride=1 needs 7 checkpoints, got 6"),
        ({}, {"window": 3, "stride": 3}, "window=3 with stride=3 needs 7 checkpoints, got 6"),
    ],
)
def test_bad_input_is_named(change, recipe, message):
    given = models()
    fields = {"source": given[2].source, "metrics": given[2].metrics, "step": given[2].step, "label": "m2", **change}
    given[2] = Ingredient(**fields)
    with pytest.raises(RecipeError, match=message):
        MetricsWeightedSoup(**recipe).cook(given)
    with pytest.raises(RecipeError, match="no ingredients"):
        MetricsWeightedSoup(**recipe).cook([])


def test_checkpoints_of_different_starts_are_refused():
    torch.manual_seed(0)
    given = [
        Ingredient({"a": torch.randn(9, 9), "b": torch.randn(9, 9)}, {"train_loss": 0.1 * i + 1}) for i in range(2)
    ]
    with pytest.raises(RecipeError, match="no common start"):
        MetricsWeightedSoup().cook(given)
    MetricsWeightedSoup(common_start="ignore").cook(given)


# ---------------------------------------------------------------------------------- adapters, and HF Trainer's folders


def hf_run(tmp_path, steps=(40, 80, 120), gone=()):
    """What transformers' Trainer leaves: adapters, and a log of the loss every 20 steps."""
    from safetensors.torch import save_file

    model = trained("head")
    model.save_pretrained(tmp_path / "first")
    start = {name: value.clone() for name, value in open_checkpoint(tmp_path / "first").items()}
    config = (tmp_path / "first" / "adapter_config.json").read_text()
    log = [{"step": step, "loss": 2.0 - step / 100, "epoch": 0.1} for step in range(20, 121, 20)]
    for number, step in enumerate(steps):
        if step in gone:
            continue
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        torch.manual_seed(number)
        drifted = {name: v + 0.02 * torch.randn(v.shape) if v.is_floating_point() else v for name, v in start.items()}
        save_file(drifted, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(config)
        entries = [entry for entry in log if entry["step"] <= step] + [{"step": step, "eval_loss": 1 / step}]
        state = {"global_step": step, "log_history": entries, "save_steps": 500}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        torch.save({"state": {}}, folder / "optimizer.pt")
    return tmp_path / "out"


@pytest.mark.filterwarnings("ignore:Unable to fetch remote file", "ignore:Could not find a config file")
def test_folders_of_the_trainer_bring_their_metrics(tmp_path):
    found = gather_ingredients(str(hf_run(tmp_path) / "checkpoint-*"))
    assert [item.step for item in found] == [40, 80, 120]
    # Means over the steps since the checkpoint before: of 20 and 40, of 60 and 80, of 100 and 120.
    assert [item.metrics["train_loss"] for item in found] == pytest.approx([1.7, 1.3, 0.9])
    assert [item.metrics["eval_loss"] for item in found] == pytest.approx([1 / 40, 1 / 80, 1 / 120])
    assert all(is_adapter(item.weights) for item in found)


def test_where_older_checkpoints_were_deleted_the_gap_tells(tmp_path):
    found = gather_ingredients(str(hf_run(tmp_path, gone=[40]) / "checkpoint-*"))
    assert [item.metrics["train_loss"] for item in found] == pytest.approx([1.3, 0.9])


@pytest.mark.parametrize("step", ["NaN", "Infinity"])
def test_a_step_that_is_not_finite_is_not_known(tmp_path, step):
    folder = write_adapter(tmp_path / "a", {"layer": (torch.ones(1, 2), torch.ones(2, 1))})
    (folder / "metrics.json").write_text(f'{{"step": {step}, "train_loss": 0.5}}')
    assert MetricsWeightedSoup().cook([folder]).coefficients == (1.0,)
    with pytest.raises(RecipeError, match="a: its 'step' is not known"):
        MetricsWeightedSoup("step").cook([folder])


def test_a_log_that_is_damaged_or_not_finite(tmp_path):
    folder = hf_run(tmp_path) / "checkpoint-80"
    state = folder / "trainer_state.json"
    content = json.loads(state.read_text())
    content["log_history"][2]["loss"] = math.nan
    state.write_text(json.dumps(content))
    with pytest.raises(RecipeError, match="checkpoint-80: its 'train_loss' is nan"):
        MetricsWeightedSoup().cook(gather_ingredients(str(folder.parent / "checkpoint-*")))
    for text, message in (("{", "not JSON"), ("[]", "expected a JSON object"), ("{}", "no global_step")):
        state.write_text(text)
        with pytest.raises(UnreadableCheckpoint, match=message):
            gather_ingredients(str(folder))


@pytest.mark.parametrize("merge", [None, "factor", "exact", "svd"])
@pytest.mark.filterwarnings("ignore:the merged update was cut")
def test_the_command_line_writes_a_folder_that_recook_cooks_again(tmp_path, merge, capsys):
    run = hf_run(tmp_path)
    flags = [] if merge is None else [f"--recipe.merge={merge}"]
    flags = ["--recipe=MetricsWeightedSoup", "--recipe.penalty=1.0", *flags, f"--output={tmp_path / 'merged'}"]
    main(["soup", "--ingredients", f"{run}/checkpoint-*", *flags])
    merged = open_checkpoint(tmp_path / "merged")
    weights = metric_weights([1.7, 1.3, 0.9], 1.0)
    files = [open_checkpoint(run / f"checkpoint-{step}") for step in (40, 80, 120)]
    if merge in (None, "factor"):
        mean = combine(files, weights)
        assert all(torch.allclose(merged[name], value) for name, value in mean.items())
    elif merge == "exact":
        for name, value in updates(merged).items():
            mean = sum(w * updates(file)[name] for file, w in zip(files, weights, strict=True))
            torch.testing.assert_close(value, mean, rtol=1e-4, atol=1e-5)
    assert merged.provenance["recipe"].startswith("MetricsWeightedSoup(penalty=1.0")
    capsys.readouterr()
    main(["show", str(tmp_path / "merged")])
    assert "train_loss 0.9, weight 0.6667" in capsys.readouterr().out
    main(["recook", str(tmp_path / "merged")])
    again = open_checkpoint(tmp_path / "merged.recooked")
    assert again.digest() == merged.digest()
    assert config_of(again) == config_of(merged)


@pytest.mark.parametrize("merge", ["exact", "svd"])
def test_products_go_to_a_folder_since_their_scaling_is_in_its_config(tmp_path, merge):
    layer = {"layer": (torch.ones(1, 2), torch.ones(2, 1))}
    folders = [write_adapter(tmp_path / name, layer, lora_alpha=4) for name in ("a", "b")]
    soup = MetricsWeightedSoup("step", merge=merge).cook(
        [Ingredient(folder, step=i) for i, folder in enumerate(folders)]
    )
    with pytest.raises(
        UnwritableOutput, match=f"merge='{merge}' makes an adapter .* Name a folder for it, such as soup"
    ):
        soup.save(tmp_path / "soup.safetensors")
    assert not (tmp_path / "soup.safetensors").exists()
    assert updates(soup.save(tmp_path / "soup"))["layer"].flatten().tolist() == pytest.approx([4.0] * 4)


def test_dense_on_the_command_line_and_recooked(tmp_path):
    from tests.helpers.adapters import Network

    run = hf_run(tmp_path)
    torch.manual_seed(7)
    save_weights(Network(), tmp_path / "base.safetensors")
    flags = ["--recipe=MetricsWeightedSoup", "--recipe.merge=dense", f"--recipe.base={tmp_path / 'base.safetensors'}"]
    output = tmp_path / "whole.safetensors"
    main(["soup", "--ingredients", f"{run}/checkpoint-*", *flags, f"--output={output}"])
    assert set(open_checkpoint(output)) == set(Network().state_dict())
    assert recook(output).read_bytes() == output.read_bytes()
    save_weights(
        {n: v + (1.0 if n == "first.weight" else 0) for n, v in Network().state_dict().items()},
        tmp_path / "base.safetensors",
    )
    with pytest.raises(RecipeError, match=r"base\.safetensors has changed since"):
        recook(output)


def test_files_alone_need_neither_peft_nor_transformers(tmp_path):
    run = hf_run(tmp_path)
    script = f"""
import sys
sys.modules["peft"] = sys.modules["transformers"] = None
from lightning_soup.cli.main import main
for merge in ("factor", "exact", "svd"):
    main(["soup", "--ingredients", {str(run)!r} + "/checkpoint-*", "--recipe=MetricsWeightedSoup",
          "--recipe.merge=" + merge, "--recipe.window=2", "--output=" + {str(tmp_path)!r} + "/" + merge])
assert "lightning" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, capture_output=True)
    assert open_checkpoint(tmp_path / "svd").format == "peft adapter"


def test_other_recipes_average_adapters_of_one_run_by_their_factors(tmp_path):
    run = hf_run(tmp_path)
    soup = UniformSoup().cook(gather_ingredients(str(run / "checkpoint-*")))
    merged = open_checkpoint(soup.save(tmp_path / "mean"))
    assert is_adapter(merged)
    layers = [{"layer": (torch.randn(2, 9), torch.randn(9, 2))} for _ in range(2)]
    others = [write_adapter(tmp_path / f"run{i}", layer) for i, layer in enumerate(layers)]
    for recipe in (UniformSoup(), MetricsWeightedSoup("step")):
        with pytest.raises(IncompatibleIngredients, match="are adapters of different runs"):
            recipe.cook([Ingredient(path, step=i) for i, path in enumerate(others)])
    MetricsWeightedSoup("step", merge="exact").cook([Ingredient(path, step=i) for i, path in enumerate(others)])


def test_adapters_are_not_scored(tmp_path):
    run = hf_run(tmp_path)
    with pytest.raises(RecipeError, match="adapters are merged from their files alone"):
        MetricsWeightedSoup().cook(
            gather_ingredients(str(run / "checkpoint-*")), LinearEvaluator(torch.ones(1, 1), torch.ones(1))
        )


def test_the_recipe_as_it_was_called():
    assert str(MetricsWeightedSoup("step", window=4, merge="svd", rank=8)) == (
        "MetricsWeightedSoup(metric=step, window=4, merge=svd, rank=8)"
    )
