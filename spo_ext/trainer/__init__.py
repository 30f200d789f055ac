"""Training: SPO on the trajectories of a store, with transformers.Trainer."""
