"""Recipes: how the coefficients of a soup are chosen. No Lightning here, so cooking from files starts fast."""

from lightning_soup.recipes.adaptive import AdaptiveSoup as AdaptiveSoup
from lightning_soup.recipes.evolutionary import EvolutionarySoup as EvolutionarySoup
from lightning_soup.recipes.greedy import GreedySoup as GreedySoup
from lightning_soup.recipes.ingredient import Ingredient as Ingredient
from lightning_soup.recipes.ingredient import gather_ingredients as gather_ingredients
from lightning_soup.recipes.interpolated import InterpolatedSoup as InterpolatedSoup
from lightning_soup.recipes.learned import LearnedSoup as LearnedSoup
from lightning_soup.recipes.length_average import LengthAverage as LengthAverage
from lightning_soup.recipes.metrics_weighted import MetricsWeightedSoup as MetricsWeightedSoup
from lightning_soup.recipes.provenance import recook as recook
from lightning_soup.recipes.recipe import Recipe as Recipe
from lightning_soup.recipes.recipe import Soup as Soup
from lightning_soup.recipes.recipe import Trial as Trial
from lightning_soup.recipes.uniform import UniformSoup as UniformSoup
from lightning_soup.recipes.variance_corrected import VarianceCorrectedSoup as VarianceCorrectedSoup
