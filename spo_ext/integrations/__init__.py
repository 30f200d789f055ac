"""Drop-ins for other people's trainers; each module imports its trainer when it is imported.

`huggingface` gives any Transformers model token log-probabilities without logits, `trl` is a mixin
for GRPOTrainer, `verl` registers the squared loss there.
"""
