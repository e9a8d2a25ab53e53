"""flowloom learns to turn a prompt into the text-to-image workflow that draws it best."""

__version__ = "0.1.0"
