"""Names of the images of steps and of the render server; `infra/Dockerfile` builds them.

A cluster's overlay says what it has in their place (`infra/overlays/NAME/images`).
"""

from flowloom import __version__

CPU_IMAGE = f"flowloom/cpu:{__version__}"
GPU_IMAGE = f"flowloom/gpu:{__version__}"
RENDER_IMAGE = f"flowloom/render:{__version__}"
