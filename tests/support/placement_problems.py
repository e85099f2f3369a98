"""Placement problems for tests."""

from __future__ import annotations

import numpy as np

from placement.cluster import Cluster, Link
from profiler.statistics import RoutingStatistics


def random_statistics(seed, num_layers, num_experts, most=50):
    """Counts without any structure; loads and transitions need not agree."""
    rng = np.random.default_rng(seed)
    return RoutingStatistics(
        num_tokens=1,
        popularity=rng.integers(0, most, (num_layers, num_experts)),
        top1_popularity=rng.integers(0, most, (num_layers, num_experts)),
        affinity=rng.integers(0, most, (num_layers - 1, num_experts, num_experts)),
        top1_affinity=rng.integers(0, most, (num_layers - 1, num_experts, num_experts)),
        coactivation=np.zeros((num_layers, num_experts, num_experts), dtype=np.int64),
    )


def cluster_of(nodes, gpus_per_node, inter=5e10):
    link = Link(1e-6, 4e11)
    memory = (1e12,) * (nodes * gpus_per_node)
    return Cluster("test", nodes, gpus_per_node, memory, 4e12, 1e15, 5.0, link, link, Link(1e-5, inter))
