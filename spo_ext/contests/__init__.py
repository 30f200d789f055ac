"""Code contests in miniature: what a user writes for a task of their own, and `spo quickstart`.

`problems` draws prompts with hidden tests and `programs` solutions of them, `vocabulary` is the
tokenizer, `reward` the reward, `supervised` the model to start from, `recipe` the settings.
"""
