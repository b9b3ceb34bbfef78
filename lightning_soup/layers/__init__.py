"""Layers that training puts in place of others, experts instead of feed-forward networks; and masks of pruned ones."""

from lightning_soup.layers.conversion import convert_to_dense as convert_to_dense
from lightning_soup.layers.conversion import use_experts as use_experts
from lightning_soup.layers.costs import cost_table as cost_table
from lightning_soup.layers.costs import layer_costs as layer_costs
from lightning_soup.layers.experts import average_experts_ as average_experts_
from lightning_soup.layers.masks import Masks as Masks
from lightning_soup.layers.moe import RandomUniformMoE as RandomUniformMoE
from lightning_soup.layers.prunable_weights import prunable as prunable
from lightning_soup.layers.pruning import prune_ as prune_
from lightning_soup.layers.semi_structured import to_semi_structured_ as to_semi_structured_
from lightning_soup.layers.topk_moe import TopKMoE as TopKMoE
