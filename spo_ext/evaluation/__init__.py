"""How good a policy is on held-out prompts, and a run as one page.

`evaluate` needs a generator and a reward; `spo eval` builds both and keeps what it drew, and
`spo report` shows it beside the curves of the training. Modules are imported one by one, because
the command line must work without the store and without matplotlib.
"""
