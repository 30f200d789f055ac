"""The paper's experiment in miniature: a small policy learns to write programs that pass tests.

    run(QuickstartConfig(seed=0), Path("runs/quickstart"))

or `spo quickstart --seed 0 --out runs/quickstart` from a shell.
"""

from __future__ import annotations

from pathlib import Path

from .config import QuickstartConfig

__all__ = ["QuickstartConfig", "run"]


def run(config: QuickstartConfig, out: Path, *, quiet: bool = False) -> dict[str, float]:
    """Runs the experiment, writes its files into `out` and returns the last evaluation.

    quiet leaves out progress bars and the final table. Raises SandboxError where sampled programs
    cannot be isolated, OSError if `out` is not writable.
    """
    from .experiment import run_experiment  # transformers takes seconds to import

    return run_experiment(config, out, quiet)
