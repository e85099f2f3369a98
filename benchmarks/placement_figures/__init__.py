"""The figures that the placement engine has to reach, measured: one module per group, one file of results each."""
