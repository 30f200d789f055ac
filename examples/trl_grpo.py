"""SPO in TRL's GRPOTrainer: its generation, rewards, vLLM, PEFT and logging; the loss of SPO."""

from tiny import BETA, TEMPERATURE, prompts, save_tiny_model, tokenizer
from trl import GRPOConfig, GRPOTrainer

from spo_ext.integrations.trl import SPOMixin


class SPOGRPOTrainer(SPOMixin, GRPOTrainer):
    pass


def reward(completion_ids, **columns):
    return [sum(token < 32 for token in ids) / len(ids) for ids in completion_ids]


def main(out, spo=None, **options):
    options = {"max_completion_length": 8, "max_steps": 2, "logging_steps": 1, **options}
    args = GRPOConfig(out, beta=BETA, temperature=TEMPERATURE, num_generations=4, **options)
    trainer = SPOGRPOTrainer(
        model=save_tiny_model(f"{out}/model"), reward_funcs=reward, args=args,
        train_dataset=prompts(), processing_class=tokenizer(), **(spo or {}),
    )  # fmt: skip
    trainer.train()
    return trainer


if __name__ == "__main__":
    main("runs/trl_grpo", bf16=False, use_cpu=True)  # TRL's default is bf16 on a GPU
