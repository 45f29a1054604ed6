"""TRL alone, as its documents write it, with our reward: python plain_trl.py POLICY READER QUESTIONS.parquet OUT"""

import json
import sys

from datasets import Dataset, Image
from trl import GRPOConfig, GRPOTrainer

from caprl_utils import qa_reward

policy, reader, questions, out = sys.argv[1:]
rows = Dataset.from_parquet(questions).cast_column("image", Image())
ask = [{"role": "user", "content": "Please describe this image in detail."}]
rows = rows.map(lambda row: {"prompt": ask})
trainer = GRPOTrainer(
    model=policy,
    reward_funcs=[qa_reward(reader, rounds=2)],
    args=GRPOConfig(
        output_dir=out, max_steps=2, num_generations=4, per_device_train_batch_size=4, max_completion_length=40,
        learning_rate=1e-4, use_cpu=True, report_to="none", logging_steps=1, save_strategy="no",
    ),
    train_dataset=rows,
)  # fmt: skip
trainer.train()
print(json.dumps(trainer.state.log_history))
