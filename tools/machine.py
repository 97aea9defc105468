"The machine that numbers were measured on, by name."
import platform, re, subprocess, sys
from pathlib import Path

CPUINFO = Path('/proc/cpuinfo')


def cpuinfo(key):
    "What Linux says about the first core; '' elsewhere."
    try: found = re.search(rf'^{key}\s*: *(.*\S)', CPUINFO.read_text(encoding='utf-8'), re.M)
    except OSError: return ''
    return found[1] if found else ''


def processor():
    "The name of this machine's processor."
    name = cpuinfo('model name')
    if not name and sys.platform == 'darwin':
        name = subprocess.run(['sysctl', '-n', 'machdep.cpu.brand_string'], capture_output=True, text=True).stdout.strip()
    return name or platform.processor() or platform.machine()


def processor_model():
    "The processor's name and model: names such as `AMD EPYC` are worn by several, so Linux's numbers of family and model stand beside it."
    return ', '.join([processor(), *(f'{key} {number}' for key in ('cpu family', 'model') if (number := cpuinfo(key)))])
