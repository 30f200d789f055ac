"""SPO in a plain PyTorch loop: hidden states in, loss out, no logits. One process."""

import torch
from tiny import BETA, TEMPERATURE, tiny_model, trajectories

import spo_ext


def main(steps=20):
    model, batch = tiny_model(), trajectories()
    targets = batch["labels"][:, 1:]  # the state at t predicts the token at t + 1
    head = {"weight": model.lm_head.weight, "targets": targets, "temperature": TEMPERATURE}
    terms = {"rewards": batch["rewards"], "q0": batch["q0"], "beta": BETA, "objective": "squared"}
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():  # the start is the reference, scored once: one number per trajectory
        states = model.model(**inputs).last_hidden_state[:, :-1]
        terms["ref_logprobs"] = spo_ext.token_logprobs(states, **head).sum(1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(steps):
        states = model.model(**inputs).last_hidden_state[:, :-1]
        loss = spo_ext.linear_loss(states, **head, **terms)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main())
