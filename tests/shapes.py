"Types and shapes of thousands of calls need not all be checked: `with unchecked():` leaves that out, where the same calls were checked before."
from contextlib import contextmanager

from jaxtyping import config


@contextmanager
def unchecked():
    before = config.jaxtyping_disable
    config.update('jaxtyping_disable', True)
    try: yield
    finally: config.update('jaxtyping_disable', before)
