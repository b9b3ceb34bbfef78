"""Layers that training puts in place of others: experts instead of feed-forward networks."""

from lightning_soup.layers.conversion import convert_to_dense as convert_to_dense
from lightning_soup.layers.conversion import use_experts as use_experts
from lightning_soup.layers.experts import average_experts_ as average_experts_
from lightning_soup.layers.moe import RandomUniformMoE as RandomUniformMoE
from lightning_soup.layers.topk_moe import TopKMoE as TopKMoE
