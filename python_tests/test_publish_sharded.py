"""Several processes: how tests start them, and publication of a model that FSDP2 shards."""

import time
from pathlib import Path

import pytest
from accelerate_launch import launch
from processes import alive, eventually


def test_a_sharded_model_is_published_whole(tmp_path: Path) -> None:
    """By FSDP2; a whole model, then one with an adapter, which is merged."""
    pytest.importorskip("accelerate")
    for outcomes in launch(Path(__file__).with_name("publish_sharded.py"), [str(tmp_path)]):
        assert len(outcomes) == 2
        for outcome in outcomes:
            assert outcome["sharded"]
            assert outcome["difference"] < 1e-6 < 1e-3 < outcome["before"]


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\n"
        "if os.environ['RANK'] == '1': raise SystemExit('rank one says why')\n"
        "time.sleep(60)\n"
    )
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"ranks \[1\] failed[^$]*rank one says why"):
        launch(script)
    assert time.monotonic() - start < 55


def test_time_is_up_for_what_ranks_started_too(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\nchild.wait()\n"
    )
    with pytest.raises(RuntimeError, match="time is up") as error:
        launch(script, processes=1, timeout_s=2.0)
    child = int(str(error.value).split()[-1])
    # A process of another parent takes its signal when it is scheduled.
    assert eventually(lambda: not alive(child), 120)


def test_outputs_come_by_rank(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, json\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')\n"
        "with open(os.environ['OUT'], 'w') as file:\n"
        "    json.dump([os.environ[name] for name in names] + sys.argv[1:], file)\n"
    )
    expected = [[str(rank), str(rank), "3", "127.0.0.1", "word"] for rank in range(3)]
    assert launch(script, ["word"], processes=3) == expected
