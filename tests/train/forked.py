"""Launches whose processes are forked from one that has imported torch and the rest, which takes seconds of each.

`accelerate launch` reads the launch file, sets the environment and watches over its processes as ever; only Python is
not started anew. `start_forked` is for tests of what processes compute together, `launching.start` for the start too.
"""

import atexit
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import forkserver, get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from launching import QUIET, ROOT, command


class Fork(subprocess.Popen):
    """A process that is forked from this one to do what a call of Python does; it inherits stdout and stderr."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *_):
        sys.stdout.flush()
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            os.setsid()
            become(args, env)


def become(call, environment):
    """Do what a call of Python does, and exit."""
    words = [word for word in call[1:] if word != "-u"]
    status = 1
    try:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        is_module = words[0] == "-m"
        sys.argv = words[is_module:]
        if is_module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(status)


def launch(call, environment, outputs):
    """Become `accelerate launch`, whose processes are forks and not calls of Python."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler  # noqa: PLC0415

    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering=True)
    subprocess_handler.Popen = Fork
    become(call, environment)


class ForkedLaunch:
    """A launch in a process of its own, with the methods of `subprocess.Popen` that `launching.finish` needs."""

    def __init__(self, call, environment):
        self._folder = TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        context = get_context("forkserver")
        context.set_forkserver_preload(["imported"])
        path = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
        with patch.dict(os.environ, QUIET | {"PYTHONPATH": path}):
            forkserver.ensure_running()
        self._process = context.Process(target=launch, args=(call, environment, self._outputs))
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    def communicate(self, timeout):
        """What it wrote to stdout and stderr, once it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("launch", timeout)
        written = tuple(path.read_text() for path in self._outputs)
        self._folder.cleanup()
        return written

    def terminate(self):
        self._process.terminate()


def start_forked(launch_file, *arguments, **environment):
    """`launching.start`, forked."""
    return ForkedLaunch(command(launch_file, *arguments), os.environ | QUIET | environment)
