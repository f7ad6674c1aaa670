"""The configuration of a node: how it is read, that each key is documented, and what is refused."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from stub_nodes import GOOD, PROFILE, ZENOH

from wwwserve.serving import config
from wwwserve.serving.http.keys import Identity


def test_a_file_is_read_as_it_is_meant(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    whole = yaml.safe_dump(GOOD)
    file.write_text(whole + "stake: 1e-3\n")
    assert config.load(file).stake == 0.001
    for more, message in (("name: again\n", "key 'name' twice"), ("port: !!int x\n", "not YAML"), ("a: [", "not YAML")):
        file.write_text(whole + more)
        with pytest.raises(config.ConfigError, match=f"node.yaml: .*{message}"):
            config.load(file)


KEY = Identity.generate().name
TLS = {"ca": __file__, "certificate": __file__, "key": "no.key"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "x"}, "unknown field `nam`"),
        ({"port": "x"}, r"Expected `int`, got `str` - at `\$.port`"),
        ({"port": 70000}, "port must be 0 to 65535, got 70000"),
        ({"deadlines_s": [5, 3]}, "deadlines_s must be"),
        ({"engine": {"url": "h:1", "profile": PROFILE}}, "every url must be http"),
        ({"engine": {"url": "http://h:1", "profile": PROFILE | {"gpu": "abacus"}}}, "abacus"),
        ({"engine": {"url": "http://h:1", "kind": "llm", "profile": PROFILE}}, r"at `\$.engine.kind`"),
        ({"engine": {"url": "http://h:99999", "profile": PROFILE}}, "engine.url must be .* got 'http://h:99999'"),
        ({"engine": {"url": ["http://h:1", "http://[::1:2"], "profile": PROFILE}}, "engine.url must be http:// or"),
        ({"tracing": {"endpoint": "http://[::1"}}, "tracing.endpoint must be http:// or https://"),
        ({"tracing": {"endpoint": "http://h:0/v1/traces"}}, "tracing.endpoint must be"),
        ({"tracing": {"endpoint": "http:///v1/traces"}}, "tracing.endpoint must be"),
        ({"key": ""}, "key must be a file"),
        ({"cors": {"origins": ["app.example"]}}, r"cors.origins must be \* or http:// or https://.* got 'app.example'"),
        ({"cors": {"origins": ["https://app.example/"]}}, "cors.origins must be"),
        ({"aliases": {"": "m"}}, "aliases must be printable"),
        ({"name": "x" * 65}, "name must be 1 to 64"),
        ({"peers": [{"key": KEY, "url": "http://h:2"}] * 2}, "peers must be of different keys"),
        ({"peers": [{"key": "north", "url": "http://h:2"}]}, "every peer's key must be a public key, got 'north'"),
        ({"classes": {str(k): {"deadline_s": 5} for k in range(5)}}, "at most 4, got 5"),
        ({"market": {"payment": "barter"}}, r"'barter' - at `\$.market.payment`"),
        ({"market": {"prices": [1.0]}}, "unknown field `prices`"),
        ({"compute_cost_per_ktok": -1.0}, "compute_cost_per_ktok must be 0 to 1,000 credits, got -1"),
        ({"policy": "nosuch"}, r"policy must be competitive, cooperative, a rule \(single, .*\) or the folder of a"),
        ({"stake": math.inf}, "stake must be finite, got inf"),
        ({"deadlines_s": [1.0, math.nan]}, "deadlines_s.1 must be finite, got nan"),
        ({"credit": -1.0}, "credit must be 0 to 1,000,000,000 credits, got -1"),
        ({"stake": 1e300}, r"stake must be 0 to 1,000,000,000 credits, got 1e\+300"),
        ({"limits": {"body_bytes": -1}}, "limits.body_bytes must be above 0, got -1"),
        ({"engine": {"url": "http://h:1", "profile": PROFILE | {"max_num_seqs": 10**9}}}, "max_num_seqs must be 1 to"),
        ({"membership": {"kind": "rumour"}}, r"at `\$.membership.kind`"),
        ({"membership": {"kind": "static", "network": "x"}}, "unknown field `network`"),
        ({"membership": {"kind": "zenoh", "network": "x"}}, "missing required field `listen`"),
        ({"membership": ZENOH | {"network": ""}}, "membership.network must be some printable"),
        ({"membership": ZENOH | {"listen": []}}, "membership.listen must be at least one tcp/HOST:PORT"),
        ({"membership": ZENOH | {"connect": ["h:7447"]}}, r"membership.connect must be .* got \('h:7447',\)"),
        ({"membership": ZENOH | {"tls": TLS}}, "membership.listen must be at least one tls/HOST:PORT"),
        (
            {"membership": ZENOH | {"listen": ["tls/h:1"], "tls": TLS}},
            "membership.tls.key must be a file, got 'no.key'",
        ),
        ({"membership": ZENOH, "peers": [{"key": KEY, "url": "http://h:2"}]}, "peers must be left out"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_field(change: dict[str, Any], message: str) -> None:
    for policy in ("cooperative", "competitive", "earliest_finish"):
        assert config.parse(GOOD | {"policy": policy}, "node.yaml").policy == policy
    assert config.parse(GOOD, "node.yaml").port == 9000
    with pytest.raises(config.ConfigError, match=f"node.yaml: .*{message}"):
        config.parse(GOOD | change, "node.yaml")


def test_a_node_compiles_before_it_starts_what_it_does_with_requests() -> None:
    code = """
import sys
from wwwserve.agents import protocol
from wwwserve.serving import config, node, node_provider
settings = config.parse(%r, "test")
node.warm_up(settings, node.policy_of(None))
for name, each in vars(node_provider).items():
    if getattr(each, "signatures", None) == [] and each.__module__ == node_provider.__name__:
        print(name)
for name, each in vars(protocol).items():
    if getattr(each, "signatures", None) == [] and any(
        getattr(module, name, None) is each for at, module in sys.modules.items() if ".serving.ledger." in at
    ):
        print(name)
kinds = len(node_provider._appraise.signatures)
for count in range(3):
    provider = node.provider_of(settings, node.policy_of(None))
    provider.appraise([(0, True, 1.0)] * count, 0.0)
if len(node_provider._appraise.signatures) != kinds:
    print("_appraise for some number of requests")
"""
    settings = GOOD | {"ledger": {"file": "n.db", "limits": {Identity.generate().name: {"ours": 1, "theirs": 1}}}}
    done = subprocess.run([sys.executable, "-c", code % settings], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_reading_a_configuration_waits_for_no_compiler(tmp_path: Path) -> None:
    """Else each command that reads one would, the first time; and `up` would say twice that kernels are compiled."""
    code = "from wwwserve.serving import config; config.parse(%r, 'test')"
    env = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA")}
    env["WWWSERVE_CACHE"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code % GOOD], capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stderr) == (0, "")
