"""The embedded world: prompts about coloured shapes, drawing, detector, tiny image models."""
