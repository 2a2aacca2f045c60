"""Measurements: sampling latency, training steps, encoding throughput, and the memory they take."""

from vpae.distill import METHODS

_own = {name: vars(method).get("compared") for name, method in METHODS.items()}
# Part -> the method whose setting it compares, the setting, and two values of it.
COMPARISONS = {compared[0]: (name, *compared[1:]) for name, compared in _own.items() if compared}
