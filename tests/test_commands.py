"""Commands that tests begin in a forked process are as those that Python begins anew."""

import os
import signal
import subprocess
import sys
import time

import commands
import pytest
from conftest import ROOT

PROGRAMS = {
    "what it is given": "import os, sys; print(sys.argv, os.getcwd(), os.environ['MARK'], input())",
    "modules": "print(__name__); import json; print(json.__name__)",
    "a status": "import sys; print('told'); sys.exit(7)",
    "a word as status": "raise SystemExit('no')",
    "an error": "raise ValueError('no')",
    "registered for its end": "import atexit; atexit.register(print, 'end'); print('begin')",
    "interrupted": "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
    "terminated": "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)",
    "a worker": "import multiprocessing as m\np = m.Process(target=print, args=(1,))\np.start()\n"
    "p.join()\nprint(p.exitcode)",
    "a function of its own": "import sys\ndef f(): pass\n"
    "print(sys.modules['__main__'].f is f, f.__module__)",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_is_run_as_python_runs_it(program, tmp_path):
    told = {"cwd": tmp_path, "timeout": 60}
    here = commands.run("-c", program, "a", "b", stdin="line\n", environment={"MARK": "m"}, **told)
    alone = subprocess.run(
        [sys.executable, "-c", program, "a", "b"], env=os.environ | {"MARK": "m"},
        input="line\n", capture_output=True, text=True, **told,
    )  # fmt: skip
    assert (here.returncode, here.stdout) == (alone.returncode, alone.stdout)
    assert here.stderr.splitlines()[-1:] == alone.stderr.splitlines()[-1:]


@pytest.mark.parametrize("command", [["train.py"], ["-m", "minibert.prepare"]])
def test_a_command_is_run_as_python_runs_it(command):
    """Of the folder that it is begun in, whatever that folder holds for tests."""
    here = commands.run(*command, "--help", cwd=ROOT)
    alone = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert (here.returncode, here.stdout, here.stderr) == (0, alone.stdout, alone.stderr)


def test_one_that_runs_on_is_ended_in_time():
    begun = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        commands.run("-c", "import time; time.sleep(99)", timeout=0.3)
    assert time.monotonic() - begun < 60


def test_a_session_of_its_own_can_be_signalled_at_once():
    program = "import subprocess; subprocess.run(['sleep', '99'])"
    for _ in range(5):
        running = commands.Command("-c", program, start_new_session=True)
        assert os.getpgid(running.pid) == running.pid != os.getpgid(0)
        os.killpg(running.pid, signal.SIGKILL)
        assert running.wait(9) == -9
        running.wait_for_group(9)
        running.kill()  # it has ended: nothing happens


def test_one_that_runs_on_can_be_ended():
    running = commands.Command("-c", "print(1, flush=True); import time; time.sleep(99)")
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(0.3)
    assert (running.poll(), running.told()) == (None, "1\n")
    running.kill()
    assert running.communicate(9) == ("1\n", "")
    assert running.returncode == -9
