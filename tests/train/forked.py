"""Launches whose processes are forked from one that has imported torch and the rest, which takes seconds of each.

`accelerate launch` reads the launch file, sets the environment and watches over its processes as ever; only Python is
not started anew. `start_forked` is for tests of what processes compute together, `launching.start` for the start too.
"""

import atexit
import ctypes
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import forkserver, get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

from launching import QUIET, ROOT, command

from align.workflow import launcher


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


def enter(holder):
    """Enter the user and network namespaces of a process, as nsenter does; Python has `os.setns` from 3.12 on."""
    files = [os.open(f"/proc/{holder}/ns/{name}", os.O_RDONLY) for name in ("user", "net")]
    for file in files:
        if ctypes.CDLL(None, use_errno=True).setns(file, 0):
            raise OSError(ctypes.get_errno(), f"the namespaces of process {holder} cannot be entered")
        os.close(file)


def launch(call, environment, folder, outputs, holder):
    """Become `accelerate launch` in a folder; its processes are forks and not calls of Python."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler  # noqa: PLC0415

    os.chdir(folder)
    if holder is not None:
        enter(holder)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering=True)
    subprocess_handler.Popen = Fork
    become(call, environment)


class ForkedLaunch:
    """A launch in a process of its own, which writes stdout and stderr to files."""

    def __init__(self, call, environment, outputs, holder=None):
        context = get_context("forkserver")
        context.set_forkserver_preload(["imported"])
        path = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
        with patch.dict(os.environ, QUIET | {"PYTHONPATH": path}):
            forkserver.ensure_running()
        self._process = context.Process(target=launch, args=(call, environment, os.getcwd(), outputs, holder))
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("launch", timeout)
        return self.returncode

    def terminate(self):
        self._process.terminate()


class LaunchOfScript(ForkedLaunch):
    """A launch with the methods of `subprocess.Popen` that `launching.finish` needs."""

    def __init__(self, call, environment, holder=None):
        self._folder = TemporaryDirectory()
        self._written = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        super().__init__(call, environment, self._written, holder)

    def communicate(self, timeout):
        """What it wrote to stdout and stderr, once it has ended."""
        self.wait(timeout)
        written = tuple(path.read_text() for path in self._written)
        self._folder.cleanup()
        return written


class LaunchOfStep(ForkedLaunch):
    """A launch of a step, with the methods of `subprocess.Popen` that `align.workflow.launcher` needs."""

    def __init__(self, call, *, env, stdout, stderr, process_group):
        super().__init__(call, env | QUIET, [Path(stdout.name)] * 2)

    @property
    def pid(self):
        return self._process.pid

    def kill(self):
        self._process.kill()


def fork_launches(patch):
    """Let the pipelines of this process fork the processes of their launched steps."""
    names = SimpleNamespace(Popen=LaunchOfStep, STDOUT=subprocess.STDOUT, TimeoutExpired=subprocess.TimeoutExpired)
    patch.setattr(launcher, "subprocess", names)


def start_forked(launch_file, *arguments, **environment):
    """`launching.start`, forked."""
    return LaunchOfScript(command(launch_file, *arguments), os.environ | QUIET | environment)
