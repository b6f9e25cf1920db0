from hypothesis import settings

# A busy machine must not fail a test.
settings.register_profile("repertory", deadline=None)
settings.load_profile("repertory")
