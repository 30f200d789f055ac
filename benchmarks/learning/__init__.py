"""Does it learn, and better than what? Small runs of SPO beside their controls.

    PYTHONPATH=benchmarks python -m learning.recipes --budget 30 --split test --out FILE.jsonl
    PYTHONPATH=benchmarks python -m learning.tables FILE.jsonl

The problems, the policy and the reward are those of `spo_ext.contests`; the trainer is
`SPOTrainer`.
"""
