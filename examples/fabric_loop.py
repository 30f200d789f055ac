"""SPO in a Lightning Fabric loop, on any number of processes."""

import torch
from lightning_fabric import Fabric
from tiny import BETA, TEMPERATURE, rows, tiny_model

import spo_ext
from spo_ext.integrations.huggingface import add_token_logprobs


def main(epochs=10):
    fabric, model = Fabric(accelerator="auto", devices="auto"), tiny_model()
    fabric.launch()
    add_token_logprobs(model, temperature=TEMPERATURE)
    # Batches of one size: only then is the mean over ranks the mean over all sequences.
    loader = torch.utils.data.DataLoader(rows(model), batch_size=4, drop_last=True)
    loader = fabric.setup_dataloaders(loader)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    losses = []
    for batch in (batch for _ in range(epochs) for batch in loader):
        ref_logprobs, rewards, q0 = (batch.pop(n) for n in ("ref_logprobs", "rewards", "q0"))
        targets = batch.pop("labels")
        terms = {"mask": targets[:, 1:] != -100, "beta": BETA, "objective": "squared"}
        logprobs = model(**batch, logprob_targets=targets)
        loss = spo_ext.loss(logprobs, ref_logprobs, rewards, q0, **terms)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main())
