"""V-PAE's side of VBench-I2V (`vbench_i2v`): its own rows, its own samples, small stand-ins for the networks."""
