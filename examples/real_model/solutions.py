"""Writes the right answers of a store's first training prompts, as rows for spo import.

python examples/real_model/solutions.py STORE COUNT > solutions.jsonl
"""

import json
import sys
from itertools import islice

from spo_ext.store import TrajectoryStore

store, count = sys.argv[1], int(sys.argv[2])
with TrajectoryStore(store) as opened:
    for prompt in islice(opened.prompts("train"), count):
        said = [{"role": "assistant", "content": prompt.answer}]
        row = {"prompt": prompt.content, "completion": said, "reward": 1.0}
        # The columns, too, say which prompt it is.
        print(json.dumps(row | {"answer": prompt.answer} | dict(prompt.columns)))
