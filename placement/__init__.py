"""Placement: decides which GPU holds which expert, and says what that should gain."""
