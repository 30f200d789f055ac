"""SPO in an Accelerate loop, on any number of processes."""

import torch
from accelerate import Accelerator
from tiny import BETA, TEMPERATURE, rows, tiny_model

import spo_ext
from spo_ext.integrations.huggingface import add_token_logprobs


def main(epochs=10):
    accelerator, model = Accelerator(gradient_accumulation_steps=2), tiny_model()
    add_token_logprobs(model, temperature=TEMPERATURE)
    # Batches of one size: only then is a mean of means the mean over all sequences.
    loader = torch.utils.data.DataLoader(rows(model), batch_size=2, drop_last=True)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in (batch for _ in range(epochs) for batch in loader):
        ref_logprobs, rewards, q0 = (batch.pop(n) for n in ("ref_logprobs", "rewards", "q0"))
        targets = batch.pop("labels")
        with accelerator.accumulate(model):  # backward divides by the accumulation steps
            terms = {"mask": targets[:, 1:] != -100, "beta": BETA, "objective": "squared"}
            logprobs = model(**batch, logprob_targets=targets)
            loss = spo_ext.loss(logprobs, ref_logprobs, rewards, q0, **terms)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


if __name__ == "__main__":
    print(main())
