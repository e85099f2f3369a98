"""The native path: one compact decoder for the families that are served most, over the operators of `kernels`."""
