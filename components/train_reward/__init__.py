"""Train one member of the reward ensemble."""

from components.train_reward.component import train_reward

__all__ = ["train_reward"]
