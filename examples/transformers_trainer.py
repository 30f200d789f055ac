"""SPO in transformers.Trainer: checkpoints, DDP, PEFT, logging and callbacks are the Trainer's."""

import torch
from tiny import BETA, TEMPERATURE, rows, tiny_model
from transformers import Trainer, TrainingArguments

import spo_ext
from spo_ext.integrations.huggingface import add_token_logprobs


class SPOTrainer(Trainer):
    loss_is_scaled_for_ga = True  # compute_loss divides by the sequences of the whole window

    def _get_num_items_in_batch(self, batches, device):  # sequences here, for Trainer tokens
        count = torch.tensor(float(sum(len(batch["rewards"]) for batch in batches)), device=device)
        return self.accelerator.gather(count).mean()  # per rank: DDP averages the gradients

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ref, rewards, q0 = (inputs.pop(name) for name in ("ref_logprobs", "rewards", "q0"))
        targets = inputs.pop("labels")
        logprobs = model(**inputs, logprob_targets=targets)
        terms = {"reduction": "sum", "denominator": num_items_in_batch, "objective": "squared"}
        mask = targets[:, 1:] != -100
        loss = spo_ext.loss(logprobs, ref, rewards, q0, beta=BETA, mask=mask, **terms)
        return (loss, {"logprobs": logprobs}) if return_outputs else loss


def main(out, model=None, **options):
    model = model or tiny_model()
    add_token_logprobs(model, temperature=TEMPERATURE)
    args = TrainingArguments(out, remove_unused_columns=False, **options)
    trainer = SPOTrainer(model=model, args=args, train_dataset=rows(model))
    trainer.train()
    return trainer


if __name__ == "__main__":
    main("runs/transformers_trainer", num_train_epochs=10, logging_steps=1)
