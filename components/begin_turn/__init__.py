"""Begin a turn: check its arguments, freeze what it goes by."""

from components.begin_turn.component import begin_turn

__all__ = ["begin_turn"]
