"""Who is whose neighbour, where replicas gossip."""

from collections.abc import Sequence
from typing import Any, Literal

from lightning_soup.errors import UnsupportedSetup

__all__ = ["Topology", "neighbours"]

Topology = Literal["ring", "complete", "regular"] | list[list[int]]


def neighbours(topology: Topology, world_size: int, degree: int = 4, seed: int = 0) -> list[tuple[int, ...]]:
    """The neighbours of each replica.

    Args:
        topology: ``"ring"``, ``"complete"``, ``"regular"`` (a random graph in which all have ``degree`` neighbours), or
            the edges as pairs of ranks.
        world_size: How many replicas there are.
        degree: Of ``"regular"``.
        seed: Of ``"regular"``.

    Raises:
        UnsupportedSetup: There is no such graph, an edge leads nowhere, or the replicas are not all connected.
    """
    import networkx as nx  # takes a while, and few need it

    owner = f"GossipAveraging(topology={topology!r})"
    if topology == "ring":
        graph = nx.cycle_graph(world_size) if world_size > 2 else nx.path_graph(world_size)
    elif topology == "complete":
        graph = nx.complete_graph(world_size)
    elif topology == "regular":
        if not 0 < degree < world_size or degree * world_size % 2:
            raise UnsupportedSetup(
                f"{owner}: no graph of {world_size} replicas gives each {degree} neighbours. The degree must be below "
                "the number of replicas, and one of the two even."
            )
        graph = nx.random_regular_graph(degree, world_size, seed=seed)
    elif isinstance(topology, str):
        raise UnsupportedSetup(f"{owner}: expected 'ring', 'complete', 'regular' or a list of pairs of ranks.")
    else:
        graph = _of_edges(topology, world_size, owner)
    parts = list(nx.connected_components(graph))
    if len(parts) > 1:
        alone = sorted(min(parts, key=len))
        raise UnsupportedSetup(
            f"{owner}: the replicas {alone} are not connected with the others, so they would never meet. Add edges"
            + (", or take another seed or degree." if topology == "regular" else ".")
        )
    return [tuple(sorted(graph.neighbors(rank))) for rank in range(world_size)]


def _of_edges(edges: Sequence[Sequence[int]], world_size: int, owner: str) -> Any:
    import networkx as nx

    graph = nx.Graph()
    graph.add_nodes_from(range(world_size))
    for edge in edges:
        pair = list(edge) if isinstance(edge, Sequence) else []
        if len(pair) != 2 or pair[0] == pair[1] or not all(type(end) is int and 0 <= end < world_size for end in pair):
            raise UnsupportedSetup(f"{owner}: {edge!r} is no pair of two ranks from 0 to {world_size - 1}.")
        graph.add_edge(*pair)
    return graph
