"""VBench-I2V: nine dimensions, their totals, and what runs them over a suite."""
