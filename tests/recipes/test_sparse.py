"""Soups of pruned networks after the fact: one mask is kept, others are refused or pruned again."""

import pytest
import torch

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation import Evaluator
from lightning_soup.layers.masks import Masks
from lightning_soup.layers.pruning import prune_
from lightning_soup.recipes import GreedySoup, UniformSoup, recook
from lightning_soup.recipes.provenance import provenance_of
from lightning_soup.weights import combine, open_checkpoint, save_weights
from lightning_soup.weights.zeros import compare_zeros

NAMES = ["a.weight", "b.weight"]


def network(seed: int, masks: Masks | None = None, share: float = 0.5) -> dict[str, torch.Tensor]:
    """A network near to one start; pruned by itself where there are no masks."""
    start, draw = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    found = {name: torch.randn(40, 30, generator=start) for name in NAMES}
    found = {name: value + 0.3 * torch.randn(40, 30, generator=draw) for name, value in found.items()}
    if masks is None:
        prune_(found, share)
    else:
        masks.apply_(found)
    return {**found, "a.bias": torch.randn(40, generator=draw)}


def convolution(seed: int) -> dict[str, torch.Tensor]:
    """A dense network near to one start."""
    start, draw = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (10, 40), "b.weight": (5, 6), "c.weight": (6, 20, 3, 3)}
    found = {name: torch.randn(shape, generator=start) for name, shape in shapes.items()}
    return {name: value + 0.3 * torch.randn(value.shape, generator=draw) for name, value in found.items()}


class One(Evaluator):
    """Finds all alike."""

    metric, mode = "val_acc", "max"

    def score(self, weights):
        return 1.0


class Never(Evaluator):
    """Is not asked."""

    def score(self, weights):
        raise AssertionError("a candidate was judged")


def zeros(weights) -> int:
    return sum(int((weights[name] == 0).sum()) for name in NAMES)


def shared() -> Masks:
    draw = torch.Generator().manual_seed(1)
    return Masks({name: torch.rand(40, 30, generator=draw) < 0.5 for name in NAMES})


@pytest.mark.parametrize("recipe", [UniformSoup(), UniformSoup(weights=[3.0, 1.0, -1.0])])
def test_one_mask_is_kept_exactly(recipe):
    masks = shared()
    weights = recipe.cook([network(seed, masks) for seed in range(3)]).weights()
    for name in NAMES:
        assert torch.equal(weights[name] != 0, masks[name])


def test_golden_4_zeros_that_cancel_are_no_mask():
    """By mask a third is pruned, by zeros two thirds."""
    mask = Masks({"w": torch.tensor([[True, True, False]])})
    mean = combine([{"w": torch.tensor([[0.5, 1, 0]])}, {"w": torch.tensor([[-0.5, 3, 0]])}], [0.5, 0.5])
    assert mean["w"].tolist() == [[0, 2, 0]]
    assert mask.sparsity == pytest.approx(1 / 3)


def test_golden_4_other_masks():
    pair = [{"w": torch.tensor([[2.0, 1, 0, 0]])}, {"w": torch.tensor([[4.0, 0, -1.5, 0]])}]
    with pytest.raises(RecipeError, match=r"at different places \('w' is the first\).*keep 50.0%, 50.0%.*keep 75.0%"):
        UniformSoup(common_start="ignore").cook(pair)
    soup = UniformSoup(common_start="ignore", reprune=True).cook(pair)
    assert soup.weights()["w"].tolist() == [[3, 0, -0.75, 0]]


@pytest.mark.parametrize("recipe", [UniformSoup(), GreedySoup()])
def test_other_masks_are_refused_with_the_density_that_would_come_of_it(recipe):
    pair = [network(seed) for seed in (1, 2)]
    together = 1 - int(sum(((pair[0][n] == 0) & (pair[1][n] == 0)).sum() for n in NAMES)) / 2400
    with pytest.raises(RecipeError, match=f"and the average would keep {together:.1%}"):
        recipe.cook(pair, Never())


class TestRepruned:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
    def test_as_sparse_as_the_sparsest(self, suffix, tmp_path):
        for seed, share in ((1, 0.5), (2, 0.6)):
            save_weights(network(seed, share=share), tmp_path / f"{seed}.safetensors")
        soup = UniformSoup(reprune=True).cook([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
        weights = soup.weights()
        assert zeros(weights) == 1440
        path = soup.save(tmp_path / f"soup{suffix}")
        saved = open_checkpoint(path)
        assert all(torch.equal(saved[name], weights[name]) for name in weights)
        assert saved.provenance["repruned"] == [0.6, NAMES, "global"]
        again = recook(path)
        assert open_checkpoint(again).digest() == saved.digest()

    @pytest.mark.parametrize(
        "damaged",
        [
            None,
            0.5,
            [0.5],
            [0.5, NAMES],
            [0.5, ["other"], "global"],
            [0.5, [], "global"],
            [2.0, NAMES, "global"],
            ["x", NAMES, "global"],
            [0.5, "a.weight", "global"],
            [0.5, NAMES, 2],
        ],
    )
    def test_a_damaged_record_is_not_recooked(self, damaged, tmp_path, monkeypatch):
        for seed in (1, 2):
            save_weights(network(seed), tmp_path / f"{seed}.safetensors")
        soup = UniformSoup(reprune=True).cook([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
        record = {**provenance_of(soup, tmp_path), "repruned": damaged}
        monkeypatch.setattr("lightning_soup.recipes.provenance.provenance_of", lambda *_: record)
        path = soup.save(tmp_path / "soup.safetensors")
        with pytest.raises(RecipeError, match=r"a selection, found .*\. Cook the soup anew"):
            recook(path)

    def test_what_is_dense_in_them_stays_so(self):
        pair = [network(seed) | {"pos_embed": torch.full((1, 5, 4), 1e-3 * seed)} for seed in (1, 2)]
        weights = UniformSoup(reprune=True).cook(pair).weights()
        assert weights["pos_embed"].all()
        assert zeros(weights) == 1200

    @pytest.mark.parametrize(("selection", "amount"), [("2:4", 0.5), ("1:2", 0.5), ("4:10", 0.6)])
    def test_n_of_m_is_kept(self, selection, amount, tmp_path):
        n, m = map(int, selection.split(":"))
        for seed in (1, 2):
            weights = convolution(seed) | {"none": torch.zeros(0, 4)}
            prune_({name: weights[name] for name in ("a.weight", "c.weight")}, amount, selection=selection)
            save_weights(weights, tmp_path / f"{seed}.safetensors")
        soup = UniformSoup(reprune=True).cook([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
        weights = soup.weights()
        for name in ("a.weight", "c.weight"):
            groups = (weights[name] != 0).movedim(1, -1).unflatten(-1, (-1, m))
            assert (groups.sum(-1) == n).all()
        assert weights["b.weight"].all()
        path = soup.save(tmp_path / "soup.safetensors")
        assert open_checkpoint(path).provenance["repruned"][2] == selection
        assert open_checkpoint(recook(path)).digest() == open_checkpoint(path).digest()

    @pytest.mark.parametrize(
        ("selections", "told"),
        [
            (("rows", "rows"), "rows, rows"),
            (("2:4", "1:4"), "2:4, 1:4"),
            (("2:4", "global"), "2:4, single weights"),
            (("global", "rows"), "single weights, rows"),
        ],
        ids=str,
    )
    def test_patterns_that_would_be_lost_are_refused(self, selections, told):
        pair = []
        for seed, selection in enumerate(selections):
            pair.append(convolution(seed))
            prune_(
                {n: pair[-1][n] for n in ("a.weight", "c.weight")}, 0.75 if "1:4" in selection else 0.5, None, selection
            )
        with pytest.raises(RecipeError, match=rf"pruned in patterns \({told}\).*or prune the average yourself"):
            UniformSoup(reprune=True).cook(pair)

    def test_into_a_module(self):
        module = torch.nn.ModuleDict({"a": torch.nn.Linear(30, 40), "b": torch.nn.Linear(30, 40, bias=False)})
        UniformSoup(reprune=True).cook([network(1), network(2)]).apply_to(module)
        assert zeros(module.state_dict()) == 1200

    def test_dense_networks_are_not_pruned(self):
        dense = [network(seed, Masks({})) for seed in (1, 2)]
        with pytest.raises(RecipeError, match=r"not all ingredients are pruned\. Leave reprune out"):
            UniformSoup(reprune=True).cook(dense)


class TestWhatIsNoMask:
    @pytest.mark.parametrize(("zeroed", "refused"), [(1, False), (5, True)])
    def test_a_kept_weight_that_happens_to_be_zero(self, zeroed, refused):
        """One of about 1,200."""
        pair = [network(seed, shared()) for seed in (1, 2)]
        places = pair[0]["a.weight"].flatten().nonzero().squeeze(1)[:zeroed]
        pair[0]["a.weight"].view(-1)[places] = 0
        if not refused:
            assert zeros(UniformSoup().cook(pair).weights()) == shared().pruned
            return
        with pytest.raises(RecipeError, match="at different places"):
            UniformSoup().cook(pair)

    def test_dense_networks(self):
        assert compare_zeros([open_checkpoint(network(seed, Masks({}))) for seed in (1, 2)]) is None

    @pytest.mark.parametrize("recipe", [UniformSoup(), GreedySoup()])
    @pytest.mark.parametrize("first", [0, 1])
    def test_one_of_them_is_dense(self, recipe, first):
        pair = [network(1), network(2, Masks({}))]
        told = rf"{first + 1}\) is pruned, but .*{2 - first}\) is dense, and so is every average of both"
        with pytest.warns(UserWarning, match=told):
            soup = recipe.cook(pair[::-1] if first else pair, One())
        assert "leave out those that are dense" in soup.notes[0]

    def test_layers_that_are_zero_yet(self):
        pair = [network(seed, Masks({})) for seed in (1, 2)]
        for weights in pair:
            weights["b.weight"].zero_()
        assert compare_zeros([open_checkpoint(weights) for weights in pair]) is None

    def test_only_biases(self):
        assert compare_zeros([open_checkpoint({"bias": torch.zeros(3)})] * 2) is None

    def test_a_few_zeros_are_no_mask(self):
        few = Masks({name: torch.rand(40, 30, generator=torch.Generator().manual_seed(1)) < 0.98 for name in NAMES})
        assert compare_zeros([open_checkpoint(network(seed, few)) for seed in (1, 2)]) is None


class TestWhereTheyAreZero:
    def test_one_mask(self):
        found = compare_zeros([open_checkpoint(network(seed, shared())) for seed in (1, 2)])
        density = 1 - shared().sparsity
        assert (found.matrices, found.apart) == (tuple(NAMES), None)
        assert (*found.densities, found.together) == pytest.approx((density,) * 3)

    def test_one_within_the_other(self):
        inner = {name: mask & (torch.arange(30) % 2 == 0) for name, mask in shared().items()}
        pair = [open_checkpoint(network(1, masks)) for masks in (Masks(inner), shared())]
        for files, order in ((pair, (0, 1)), (pair[::-1], (1, 0))):
            found = compare_zeros(files)
            densities = [1 - Masks(inner).sparsity, 1 - shared().sparsity]
            assert found.apart == "a.weight"
            assert found.densities == pytest.approx([densities[i] for i in order])
            assert found.together == pytest.approx(densities[1])

    def test_the_first_that_differs_is_named_and_what_is_empty_is_not_read(self):
        pair = [{**network(seed, shared()), "none": torch.zeros(0, 3)} for seed in (1, 2)]
        pair[1]["b.weight"][0] = 0
        assert compare_zeros([open_checkpoint(weights) for weights in pair]).apart == "b.weight"
        pair[1]["a.weight"][0] = 0
        assert compare_zeros([open_checkpoint(weights) for weights in pair]).apart == "a.weight"
        assert compare_zeros([open_checkpoint({"none": torch.zeros(0, 3), "dense": torch.ones(4, 4)})] * 2) is None
