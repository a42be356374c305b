"""Settings of every test. Profiles of hypothesis: `default`, and `nightly` for `make nightly`."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# The same cases on every machine and in every run: a failure here is a failure everywhere.
settings.register_profile(
    "default",
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("nightly", settings.get_profile("default"), max_examples=5_000)
settings.load_profile("default")
