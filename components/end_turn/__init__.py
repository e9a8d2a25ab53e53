"""End a turn: record how it went."""

from components.end_turn.component import end_turn

__all__ = ["end_turn"]
