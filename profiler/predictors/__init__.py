"""Which experts a layer will choose, told before its router has run: small predictors behind one interface.

``base.py`` holds the interface, ``registry.py`` learns all predictors of a layer, ``scoring.py`` judges them.
"""
