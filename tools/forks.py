#!/usr/bin/env python3
"""Kernels that start warm: one process imports torch and its company once, and each notebook runs in a fork of it.

`use_forks()` makes nbclient's kernels forks from then on. What is forked has imported much and computed nothing, so that no
thread is lost and no random number drawn; the library itself is not imported, and a fork sees what a new process would see.
Where there is no fork (Windows, macOS), kernels start as they always do.
"""
import gc, json, os, select, signal, socket, subprocess, sys, tempfile, time, warnings
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path

WARM = ['numpy', 'torch', 'torch.nn.functional', 'torch.utils.checkpoint', 'matplotlib.axes', 'matplotlib.backends.backend_svg', 'matplotlib.backends.backend_agg', 'matplotlib.font_manager', 'IPython.display', 'ipykernel.kernelapp', 'safetensors.torch',
        'regex', 'tiktoken', 'tokenizers', 'jaxtyping', 'tyro', 'transformers.models.gpt2.modeling_gpt2', 'transformers.models.llama.modeling_llama']
HERE = Path(__file__).resolve().parent
CAN_FORK = sys.platform == 'linux'


# In the warm process ----------------------------------------------------------------------------------------------

def serve(address):
    "Import, then fork for every request on the socket at `address`; report how each fork ended and what it used."
    sys.path[:] = [p for p in sys.path if p != str(HERE)]            # a kernel sees the library, not the tools
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name in WARM:
            try: import_module(name)
            except ImportError: pass                   # an extra that is not here: the notebook says so itself
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    forks, parent = {}, os.getppid()
    while os.getppid() == parent:                      # ends with whoever started it
        ready, _, _ = select.select([listener], [], [], 0.05)
        if ready: start(listener, forks)
        for pid in list(forks):
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done: tell(forks.pop(pid), exit=os.waitstatus_to_exitcode(status), seconds=usage.ru_utime + usage.ru_stime)


def start(listener, forks):
    "One request: fork, and become the kernel in the child."
    caller, _ = listener.accept()
    request = json.loads(caller.makefile().readline())
    pid = os.fork()
    if pid == 0:
        listener.close(), caller.close()
        become_kernel(**request)
    forks[pid] = caller
    tell(caller, pid=pid)


def become_kernel(arguments, env, cwd):
    "The fork from here on: a kernel like any other."
    os.setsid()
    os.environ.clear(), os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ['ipykernel_launcher', *arguments]
    from ipykernel.kernelapp import IPKernelApp
    try: IPKernelApp.launch_instance(parent_handle=os.getppid())       # a kernel ends with the process it came from
    finally: os._exit(0)


def tell(caller, **facts):
    try: caller.sendall(json.dumps(facts).encode() + b'\n')
    except OSError: pass                               # nobody listens any more


# In the process that runs notebooks -------------------------------------------------------------------------------

class Fork:
    "A forked kernel, as far as jupyter_client asks of a process."
    stdin = stdout = stderr = None
    spent = 0.0                                        # processor seconds of ended forks, until their parent is waited for

    def __init__(self, address, **request):
        self.line = socket.socket(socket.AF_UNIX)
        self.line.connect(address)
        self.line.sendall(json.dumps(request).encode() + b'\n')
        self.reader, self.returncode = self.line.makefile(), None
        self.pid = json.loads(self.reader.readline())['pid']

    def poll(self):
        if self.returncode is None and select.select([self.line], [], [], 0)[0]: self._end()
        return self.returncode

    def wait(self):
        if self.returncode is None: self._end()
        return self.returncode

    def _end(self):
        said = self.reader.readline()
        facts = json.loads(said) if said else {'exit': -signal.SIGKILL, 'seconds': 0.0}      # the warm process died
        self.returncode, Fork.spent = facts['exit'], Fork.spent + facts['seconds']
        self.reader.close(), self.line.close()

    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)

    def kill(self): self.send_signal(signal.SIGKILL)
    def terminate(self): self.send_signal(signal.SIGTERM)


class Warm:
    "The warm process, started when the first kernel is asked for."
    def __init__(self): self.process = self.folder = None

    def address(self):
        if self.process is not None and self.process.poll() is not None: self.close()
        if self.process is None:
            self.folder = tempfile.TemporaryDirectory(prefix='forks-')
            path = str(Path(self.folder.name)/'socket')
            self.process = subprocess.Popen([sys.executable, __file__, path], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            while not os.path.exists(path):
                if self.process.poll() is not None: raise RuntimeError(f'the warm process for kernels ended with status {self.process.returncode} before it could serve')
                time.sleep(0.02)
        return str(Path(self.folder.name)/'socket')

    def close(self):
        if self.process: self.process.kill(), self.process.wait(), self.folder.cleanup()
        self.process, Fork.spent = None, 0.0           # waited for, its forks count among this process's children


WARM_PROCESS = Warm()


def spent():
    "Processor seconds of forked kernels that do not yet count among this process's children."
    return Fork.spent


def use_forks():
    "From here on, kernels of this process are forks; without fork, nothing changes."
    if not CAN_FORK: return
    from jupyter_client.provisioning import KernelProvisionerFactory
    factory = KernelProvisionerFactory.instance()
    factory.provisioners['fork'] = EntryPoint('fork', 'forks:provisioner', 'jupyter_client.kernel_provisioners')
    factory.default_provisioner_name = 'fork'


def provisioner(**options):
    "jupyter_client's own way to start a kernel, except that it is forked."
    from jupyter_client.provisioning import LocalProvisioner

    class ForkProvisioner(LocalProvisioner):
        async def launch_kernel(self, cmd, **options):
            arguments = cmd[cmd.index('ipykernel_launcher') + 1:]
            self.process = Fork(WARM_PROCESS.address(), arguments=arguments, env=dict(options['env']), cwd=str(options['cwd']))
            self.pid = self.pgid = self.process.pid
            return self.connection_info
    return ForkProvisioner(**options)


if __name__ == '__main__': serve(sys.argv[1])
