"""Runtime: serves a Mixture-of-Experts model by a placement plan."""
