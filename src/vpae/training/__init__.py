"""The one training loop, and what it needs: exact resume, EMA, signals."""
