"""Calibrate the reward ensemble."""

from components.calibrate_reward.component import calibrate_reward

__all__ = ["calibrate_reward"]
