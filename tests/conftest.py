"""What holds for every test: one thread, and hypothesis without a clock."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Drawing a tensor is slow on a loaded machine, and that is no fault of the law under test.
settings.register_profile("ffr", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ffr-ci", settings.get_profile("ffr"), derandomize=True)
settings.load_profile("ffr-ci" if os.environ.get("CI") else "ffr")

# Small tensors lose more in hand-over between threads than they gain; it also makes sums repeatable.
torch.set_num_threads(1)


@pytest.fixture
def held_by_another():
    """A block in which another process writes to a folder; it is killed at the end."""

    @contextmanager
    def hold(folder):
        code = "import sys, pathlib; from recipe.files import alone\n"
        code += "with alone(pathlib.Path(sys.argv[1])): print('held', flush=True), input()"
        command = [sys.executable, "-c", code, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=Path(__file__).parents[1] / "examples", **pipes) as other:
            assert other.stdout.readline() == "held\n"
            yield
            other.kill()

    return hold


@pytest.fixture
def outlived(tmp_path):
    """Whether any process that a script started is there ten seconds after it was killed at its first line."""

    def outlived(code, *words):
        (tmp_path / "script.py").write_text(code)
        roots = os.pathsep.join(str(Path(__file__).parents[1] / folder) for folder in (".", "examples"))
        command, paths = [sys.executable, tmp_path / "script.py", *words], os.environ | {"PYTHONPATH": roots}
        with subprocess.Popen(command, env=paths, stdout=subprocess.PIPE, start_new_session=True) as script:
            try:
                assert script.stdout.readline() == b"working\n"
                script.kill()
                script.communicate(timeout=10)  # reads until nobody holds the other end
                return False
            except subprocess.TimeoutExpired:
                return True
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(script.pid, signal.SIGKILL)

    return outlived
