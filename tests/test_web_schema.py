"""The API of `onefold serve` keeps its own description, whatever it is sent (schemathesis)."""

from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from conftest import randomised
from onefold.networks.base import NetworkConfig, build
from onefold.web.app import create_app

NETWORK = NetworkConfig(width=16, depth=1, heads=2, classes=3, class_names=("cat", "dog", "7"))


APP = create_app(randomised(build(NETWORK)).eval(), device="cpu")
schema = schemathesis.openapi.from_asgi("/openapi.json", APP)


@schema.parametrize()
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_described(case: Any):
    """Statuses, types and bodies; no failure of the server; wrong parameters refused.

    Which words are classes and solvers is the network's to say, not the description's, and a file of any bytes is
    rarely an image: so right types alone are not always accepted.
    """
    case.call_and_validate(excluded_checks=[positive_data_acceptance])
