"""The cost model: time of a step's MoE layers under a placement (``step_us``).

step_us = Σ over layers of [ max over GPUs of (c0·[active > 0] + c1·active + c2·pairs) + exchange ], in microseconds.
Attention and everything else that no placement changes is left out.

Shape suffixes: N steps, G GPUs, C link classes (NVLink within a node, network between nodes).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from placement.cluster import Cluster, Coefficients, Link

#: Bytes that one token's route takes when routes are gathered: one 16-bit expert id per choice.
ROUTE_BYTES_PER_CHOICE = 2


def expert_us(
    active_NG: NDArray[np.integer], pairs_NG: NDArray[np.integer], coefficients: Coefficients
) -> NDArray[np.float64]:
    """Time of the experts of one layer, float64 [N]: that of the slowest GPU.

    Args:
        active_NG: [N, G], active experts per GPU.
        pairs_NG: [N, G], token–expert pairs per GPU.
        coefficients: of the model's experts on this cluster.
    """
    c0, c1, c2 = (c.value for c in (coefficients.c0_us, coefficients.c1_us, coefficients.c2_us))
    per_gpu = c0 * (active_NG > 0) + c1 * active_NG + c2 * pairs_NG
    slowest: NDArray[np.float64] = per_gpu.max(axis=1)
    return slowest


def allreduce_us(cluster: Cluster, num_tokens: int, hidden_state_bytes: int) -> float:
    """Time of one all-reduce of the step's hidden states: latency + 2·bytes / bandwidth of the slowest link."""
    if cluster.num_gpus == 1:
        return 0.0
    link = slowest_link(cluster)
    return 1e6 * (link.latency_s + 2 * num_tokens * hidden_state_bytes / link.bytes_per_s)


def gather_routes_us(cluster: Cluster, num_tokens: int, top_k: int) -> float:
    """Time to give every rank all routes of the step, which the dispatch rule needs."""
    if cluster.num_gpus == 1:
        return 0.0
    link = slowest_link(cluster)
    return 1e6 * (link.latency_s + num_tokens * top_k * ROUTE_BYTES_PER_CHOICE / link.bytes_per_s)


def traffic_us(cluster: Cluster, busiest_NC: NDArray[np.integer], hidden_state_bytes: int) -> NDArray[np.float64]:
    """Time of one exchange, float64 [N]: latency + bytes of the busiest port / bandwidth, of the slower link class.

    Args:
        cluster: its links; a GPU has one port per link class, with the class's bandwidth in each direction.
        busiest_NC: [N, 2], most hidden states that one port sends or receives within a node, and between nodes.
        hidden_state_bytes: bytes of one.
    """
    time_N = np.zeros(len(busiest_NC))
    for link_class, (link, in_use) in enumerate(
        ((cluster.intra_node, cluster.gpus_per_node > 1), (cluster.inter_node, cluster.nodes > 1))
    ):
        if in_use:
            bytes_N = busiest_NC[:, link_class] * hidden_state_bytes
            time_N = np.maximum(time_N, 1e6 * (link.latency_s + bytes_N / link.bytes_per_s))
    return time_N


def allreduce_bytes(cluster: Cluster, num_tokens: int, hidden_state_bytes: int) -> tuple[float, float]:
    """Bytes that one all-reduce of the step's hidden states sends over all GPUs: within nodes, and between nodes.

    A ring over all G GPUs, node after node, is assumed: each GPU sends 2·(G-1)/G of the bytes to the next, the last of
    every node over the network. This is what ``allreduce_us`` takes as 2·bytes through the slowest port.

    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", J. Parallel
    Distrib. Comput. 69 (2009), section 4.
    """
    num_gpus = cluster.num_gpus
    per_gpu = 2 * (num_gpus - 1) / num_gpus * num_tokens * hidden_state_bytes
    between_nodes = cluster.nodes if cluster.nodes > 1 else 0
    return (num_gpus - between_nodes) * per_gpu, between_nodes * per_gpu


def slowest_link(cluster: Cluster) -> Link:
    """The link class that a collective over all GPUs cannot avoid."""
    return cluster.inter_node if cluster.nodes > 1 else cluster.intra_node
