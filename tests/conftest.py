import signal

from hypothesis import settings

# A busy machine must not fail a test.
settings.register_profile("repertory", deadline=None)
settings.load_profile("repertory")

# Started in the background of a shell, this process and all that it starts would ignore Ctrl-C, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
