"""Supervised training, by TRL, on completions that spo export wrote: where SPO starts best.

python examples/supervised_start.py ROWS.jsonl MODEL OUT [--learning_rate 1e-5 ...]
"""

import sys

from datasets import Dataset
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer


def tokens(row):
    """As the store has them: nothing is tokenised again, and only completions are learnt."""
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    mask = [0] * len(prompt) + [1] * len(completion)
    return {"input_ids": prompt + completion, "completion_mask": mask}


def main(rows, model, out, *flags):
    (args,) = HfArgumentParser(SFTConfig).parse_args_into_dataclasses(["--output_dir", out, *flags])
    data = Dataset.from_json(rows).select_columns(["prompt_ids", "completion_ids"])
    data = data.map(tokens, remove_columns=data.column_names)
    trainer = SFTTrainer(model, args, train_dataset=data)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
