"""Measuring a host for the cost model: how long a rank's experts take, and what its links carry."""
