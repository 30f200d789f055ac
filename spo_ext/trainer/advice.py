"""What to do about each warning of `spo_ext.trainer.health`."""

ADVICE = {
    "nonfinite": (
        "The weights may be lost: continue from the last checkpoint, with a lower learning_rate "
        "and a max_grad_norm. Check the rewards, and the precision: fp16 lacks the range of bf16."
    ),
    "entropy": (
        "The policy hardly varies what it writes, and a group that agrees teaches nothing. Lower "
        "learning_rate, raise beta, draw larger groups (samples_per_prompt, group_size), mix in "
        "offline data (mixture), and continue from a checkpoint before the collapse."
    ),
    "residual": (
        "Lower learning_rate. Where batches hold old rows, sync more often (sync_every), leave out "
        "the oldest (max_age) and let failures fade (taper). Look for outliers of the "
        "reward; where q0 is estimated, reward_range must be that of the rewards."
    ),
    "drift": (
        "Lower learning_rate. If the number falls, failures are pushed down without end: let them "
        "fade (taper) and sync more often (sync_every). If it rises, raise beta and read "
        "what is rewarded."
    ),
    "length": (
        "Read some: if an early end pays, correct the reward. Lower learning_rate, raise beta, mix "
        "in complete offline solutions (mixture)."
    ),
    "truncated": (
        "If they need the room, raise max_new_tokens. Else check that prompts are in the format "
        "that the model knows, with its own end token, and that the reward wants an end; lower "
        "learning_rate, raise beta."
    ),
}
