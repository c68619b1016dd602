"""``python -m benchmarks``."""

import os
import sys
from pathlib import Path

# To ask whether there is a GPU would keep the processes that are forked off this one from it
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# Each file of this folder is a program as well, and imports the others by their names
sys.path.insert(0, str(Path(__file__).parent))

if __name__ == "__main__":
    from command import main

    sys.exit(main())
