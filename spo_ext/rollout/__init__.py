"""Producers: completions of stored prompts, judged and appended to the store."""

from spo_ext.rollout.generation import Generation, Generator, Judgement, Reward, Sampling

__all__ = ["Generation", "Generator", "Judgement", "Reward", "Sampling"]
