"""Code contests in miniature: what a user writes for a task of their own, and the quickstart.

`problems` draws prompts with hidden tests and `programs` solutions of them, `vocabulary` is the
tokenizer, `reward` the reward function, `supervised` the model folder, `recipe` the settings.
`quickstart` puts them into a store, a folder and a yaml, and runs `spo eval`, `spo train` and
`spo report` on them.
"""
