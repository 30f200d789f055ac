"""Does it learn on a pretrained model and real tasks, and better than what?

    PYTHONPATH=benchmarks python -m real_model.compare --model FOLDER --out FILE.jsonl

The model, the supervised start and the recipe of SPO are those of `examples/real_model/`.
"""
