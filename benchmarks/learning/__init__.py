"""Does it learn, and better than what? Small runs of SPO beside their controls.

    PYTHONPATH=benchmarks python -m learning --budget 30 --seeds 0 1 --split test

The problems, the policy and the judge are those of `spo_ext.contests`; the trajectories go through a
`TrajectoryStore`, the losses through `spo_ext.loss`.
"""
