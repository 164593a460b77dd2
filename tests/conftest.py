"""What holds for all tests."""

import signal

import pytest

from tests.interpreter import run_interpreted

# A shell starts its background jobs with SIGINT ignored, and their children inherit that; the
# tests of Ctrl-C need processes that listen to it, however the tests themselves were started.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test marked `interpreter` where Triton's kernels run on CPU tensors."""
    if pyfuncitem.get_closest_marker("interpreter") is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    run_interpreted(pyfuncitem.module.__name__, pyfuncitem.originalname, arguments)
    return True
