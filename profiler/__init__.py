"""Profiler: records how a model routes its tokens to experts, and explains it."""
