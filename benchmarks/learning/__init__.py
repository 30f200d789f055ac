"""Does it learn, and better than what? Small runs of SPO beside their controls.

    PYTHONPATH=benchmarks python -m learning --budget 30 --seeds 0 1 --split test
    PYTHONPATH=benchmarks python -m learning.recipes --recipes spo ppo --out FILE.jsonl

The problems, the policy and the judge are those of `spo_ext.contests`. The first command is a
harness with a loop of its own, which the published records come from; the second is `SPOTrainer`
with the settings of its methods.
"""
