"""Files of prompts, tests and trajectories into the store, and out of it again.

    with TrajectoryStore("trajectories.db") as store:
        Importer(store, Settings()).import_file("rows.jsonl")

`spo import` and `spo export` run the same. `submission` makes of stored tests what the sandbox
judges. Modules are imported one by one, because the command line must work without the store.
"""
