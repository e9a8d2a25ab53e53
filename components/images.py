"""Names of the images of steps and of the render server; `infra/Dockerfile` builds them.

`FLOWLOOM_IMAGES` replaces the part before the slash when a pipeline is compiled.
"""

import os

from flowloom import __version__

_PREFIX = os.environ.get("FLOWLOOM_IMAGES", "flowloom")

CPU_IMAGE = f"{_PREFIX}/cpu:{__version__}"
GPU_IMAGE = f"{_PREFIX}/gpu:{__version__}"
RENDER_IMAGE = f"{_PREFIX}/render:{__version__}"
