import sys

from vbench_i2v.command import main

sys.exit(main())
