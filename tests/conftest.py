"""What holds for all tests."""

import signal

# A shell starts its background jobs with SIGINT ignored, and their children inherit that; the
# tests of Ctrl-C need processes that listen to it, however the tests themselves were started.
signal.signal(signal.SIGINT, signal.default_int_handler)
