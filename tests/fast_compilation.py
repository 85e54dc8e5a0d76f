"""XLA flags that compile the tests' programs fast: they are tiny and run a few times."""

import jaxlib

FLAGS = "--xla_backend_optimization_level=0"
if jaxlib.version.__version_info__ < (0, 11):  # later versions end the process at this flag
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
