"""Producers: completions of stored prompts, judged and appended to the store.

    generator = ModelGenerator(model, tokenizer)
    reward = load_reward("tests", passed=0.0, failed=-1.0)
    rollouts = Rollouts(store, generator, reward, run="first", sampling=Sampling(n=8),
                        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    print(rollouts.collect(list(store.prompts("train")), policy_version=0))

`spo rollout` runs the same.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spo_ext.rollout.embedded import ModelGenerator
    from spo_ext.rollout.follow import latest_policy
    from spo_ext.rollout.generation import Generation, Generator, Judgement, Reward, Sampling
    from spo_ext.rollout.rewards import load_reward
    from spo_ext.rollout.rollouts import Rollouts, RolloutStats
    from spo_ext.rollout.server import ServerError, ServerGenerator
    from spo_ext.rollout.values import estimate_q0

__all__ = [
    "Generation",
    "Generator",
    "Judgement",
    "ModelGenerator",
    "Reward",
    "RolloutStats",
    "Rollouts",
    "Sampling",
    "ServerError",
    "ServerGenerator",
    "estimate_q0",
    "latest_policy",
    "load_reward",
]

_MODULES = {
    "ModelGenerator": "embedded",
    "RolloutStats": "stats",
    "Rollouts": "rollouts",
    "ServerError": "server",
    "ServerGenerator": "server",
    "estimate_q0": "values",
    "latest_policy": "follow",
    "load_reward": "rewards",
}


def __getattr__(name: str) -> Any:
    # On demand: the arguments of `spo rollout` are read before anybody knows if SQLAlchemy is here.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'generation')}"), name)
