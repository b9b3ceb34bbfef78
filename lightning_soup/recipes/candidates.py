"""Forming and judging candidates of a search: many combinations of the same checkpoints, one model in the evaluator."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_soup.errors import NonFiniteScore, RecipeError
from lightning_soup.evaluation.evaluator import Evaluator, Split
from lightning_soup.recipes.checks import statistics_of
from lightning_soup.weights.combine import combine, combine_many
from lightning_soup.weights.geometry import differing
from lightning_soup.weights.stored_tensor import MemoryTensor
from lightning_soup.weights.weights_file import WeightsFile, open_checkpoint

Coefficients = tuple[float, ...] | dict[str, tuple[float, ...]]


class Candidates:
    """Writes combinations into the evaluator's own tensors and has them judged.

    As many candidates as fit into ``memory`` are formed in one read of the checkpoints. Where fewer than two fit, each
    is formed where it is judged, so that no model is held beside the evaluator's; one that differs from the best in a
    few coefficients is then formed from that, which is held as a second model, and the checkpoints whose coefficients
    changed, not from all K. Tensors that are the same in all checkpoints are written once and left alone.

    BatchNorm statistics cannot be combined with negative coefficients: a variance could become negative. Where they
    differ between the checkpoints, they are estimated anew for every candidate; others, of layers that were frozen in
    training, stay as they are.

    Args:
        sources: The checkpoints.
        evaluator: Judges.
        groups: By tensor name, the row of its coefficients.
        memory: Bytes for candidates that are not judged yet.

    Raises:
        RecipeError: The checkpoints are all the same.
    """

    def __init__(
        self, sources: Sequence[WeightsFile], evaluator: Evaluator, groups: Mapping[str, int], memory: float
    ) -> None:
        self.evaluator, self.groups = evaluator, groups
        names = differing(sources)
        if not names:
            raise RecipeError(
                f"EvolutionarySoup: all {len(sources)} checkpoints hold the same weights, so there is nothing to "
                "search. Give checkpoints of different steps."
            )
        self.statistics, self._frozen = statistics_of(sources)
        self._sources = [source.only(names) for source in sources]
        slot = evaluator.slot()
        whole = open_checkpoint(combine([sources[0]], [1.0]) if slot is None else slot)
        if slot is not None:
            combine([sources[0]], [1.0], whole)  # what is the same in all is there from now on
        self._slot, self._target = dict(whole), whole.only(names)
        size = sum(spec.nbytes for spec in self._target.specs.values())
        self.at_once = max(1, int(memory // max(size, 1)))
        self._formed: list[WeightsFile] = []
        self._base: WeightsFile | None = None
        self._base_alpha_RK: Tensor | None = None

    @property
    def coarsest(self) -> torch.dtype | None:
        """The floating type of most rounding among the tensors that differ; the others stay as they are."""
        types = {spec.dtype for source in self._sources for spec in source.specs.values()}
        floating = [dtype for dtype in types if dtype.is_floating_point]
        return max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=None)

    def coefficients(self, alpha_RK: Tensor) -> Coefficients:
        """What :func:`.combine` takes for all tensors."""
        if len(alpha_RK) == 1:
            return tuple(alpha_RK[0].tolist())
        rows = [tuple(row) for row in alpha_RK.tolist()]
        return {name: rows[group] for name, group in self.groups.items()}

    def scores(self, alphas: Sequence[Tensor], skip: int = 0, best_RK: Tensor | None = None) -> Iterator[float]:
        """Judge candidates in order, each when it is asked for; NaN for one that the evaluator cannot judge.

        Args:
            alphas: Coefficients ``[R, K]`` of each.
            skip: So many of the first are formed with the others, if they are, but not judged: their scores are known.
                What is formed together does not depend on it, and so neither do the bits of the others.
            best_RK: The best coefficients so far.
        """
        for begin in range(0, len(alphas), self.at_once):
            batch = alphas[begin : begin + self.at_once]
            if begin + len(batch) <= skip:
                continue
            if self.at_once > 1:
                self._form_all(batch)
            for number, alpha_RK in enumerate(batch, begin):
                if number < skip:
                    continue
                if self.at_once > 1:
                    combine([self._formed[number - begin]], [1.0], self._target)
                else:
                    self._form(alpha_RK, best_RK)
                yield self._judge("select")

    def score_on(self, alpha_RK: Tensor, split: Split) -> float:
        """Judge one candidate on a split."""
        self._form(alpha_RK, None)
        return self._judge(split)

    def recalibrated(self, alpha_RK: Tensor) -> dict[str, Tensor]:
        """The BatchNorm statistics of a candidate; empty where those of the checkpoints do not differ."""
        if not self.statistics:
            return {}
        self._form(alpha_RK, None)
        found, specs = self._estimated(), self._sources[0].specs
        return {name: found[name].to("cpu", specs[name].dtype, copy=True) for name in found if name in specs}

    def _judge(self, split: Split) -> float:
        if self.statistics:
            found = self._estimated()
            with torch.no_grad():
                for name in found.keys() & self._target.keys():
                    self._target[name].copy_(found[name])
        try:
            score = self.evaluator.score_on(self._slot, split)
        except NonFiniteScore:
            return float("nan")
        try:
            return float(score)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RecipeError(
                f"EvolutionarySoup: {type(self.evaluator).__name__} gave {score!r:.60} as the score of a candidate on "
                f"the {split} split. Expected one number, higher where the candidate is better."
            ) from error

    def _estimated(self) -> dict[str, Tensor]:
        """The statistics of the candidate that the evaluator holds."""
        found = self.evaluator.recalibrate(self._slot, self._frozen)
        missing = [name for name in self.statistics if name not in found]
        if missing:
            raise RecipeError(
                f"EvolutionarySoup: {missing[0]!r} differs between the checkpoints, but is not estimated anew on "
                "training data (it is of no BatchNorm layer, or of one that was frozen on the way), and negative "
                "coefficients could make a variance negative. Give checkpoints in which it is the same."
            )
        return found

    def _form_all(self, alphas: Sequence[Tensor]) -> None:
        rows = [self._rows(alpha_RK) for alpha_RK in alphas]
        if len(self._formed) >= len(rows):
            combine_many(self._sources, rows, self._formed[: len(rows)])
        else:
            self._formed = []  # let go before there are new ones
            # In the types of the evaluator's, so that it does not matter to a score how candidates are formed.
            self._formed = [_in_memory(tensors) for tensors in combine_many(self._sources, rows, like=self._target)]

    def _form(self, alpha_RK: Tensor, best_RK: Tensor | None) -> None:
        """Into the evaluator's tensors."""
        changed = [] if best_RK is None else (alpha_RK != best_RK).any(0).nonzero().flatten().tolist()
        if best_RK is None or 2 * (len(changed) + 1) > alpha_RK.shape[1]:
            combine(self._sources, self._rows(alpha_RK), self._target)
            return
        if self._base_alpha_RK is None or not torch.equal(self._base_alpha_RK, best_RK):
            if self._base is None:
                self._base = _in_memory(_wide(combine(self._sources, self._rows(best_RK))))
            combine(self._sources, self._rows(best_RK), self._base)
            self._base_alpha_RK = best_RK
        change_RC = (alpha_RK - best_RK)[:, changed]
        rows = torch.cat([torch.ones(len(alpha_RK), 1, dtype=torch.float64), change_RC], 1)
        near = [self._base, *(self._sources[i] for i in changed)]
        combine(near, self._rows(rows), self._target)

    def _rows(self, alpha_RK: Tensor) -> Coefficients:
        """What :func:`.combine` takes for the tensors that differ."""
        found = self.coefficients(alpha_RK)
        if isinstance(found, dict):
            found = {name: row for name, row in found.items() if name in self._target}
        if not self.statistics:
            return found
        # Until there are new ones they are the first checkpoint's.
        alone = dict.fromkeys(self.statistics, (1.0,) + (0.0,) * (alpha_RK.shape[1] - 1))
        return {**(found if isinstance(found, dict) else {"*": found}), **alone}


def _wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In 32 bits where they have fewer, since what is formed from them is rounded once more; tied ones stay so."""
    once = {id(value): value for value in tensors.values()}
    narrow = {key for key, value in once.items() if value.is_floating_point() and value.dtype.itemsize < 4}
    wide = {key: value.float() if key in narrow else value for key, value in once.items()}
    return {name: wide[id(value)] for name, value in tensors.items()}


def _in_memory(tensors: Mapping[str, Tensor]) -> WeightsFile:
    """Opened with their names as they are: a part of a model may begin like a wrapper's prefix."""
    return WeightsFile({name: MemoryTensor(value) for name, value in tensors.items()}, label="a candidate")
