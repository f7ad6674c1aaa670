"""The learned policy: its network, its bundle, and the same decisions without torch."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save as safetensors_bytes

from agents.checkpoint import save, weights_of
from agents.decision import FIRST_CANDIDATE, HOLD, LOCAL, make_actions
from agents.network import Actor
from agents.rules import Rule
from agents.runtime import MANIFEST, WEIGHTS, BundleError, LearnedPolicy, digest, forward, load
from agents.view import FINISH_S, OVERDUE, PACE, RECORD, Views
from envs.batch import MarketBatch
from envs.scenario import load as load_scenario


@pytest.fixture(scope="module")
def actor() -> Actor:
    """An actor whose every weight matters."""
    torch.manual_seed(3)
    made = Actor(width=16)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return made


@pytest.fixture(scope="module")
def seen() -> Views:
    """Views [M] from markets in play, of providers with a request to decide on and without."""
    names = ["paper/mixed-models", "paper/bursty-churn", "market/deadlines", "liars/first"]
    batch = MarketBatch([load_scenario(name) for name in names], [11, 12, 13, 14])
    actions, rule, taken = batch.actions(), Rule("www_serve"), []
    for _ in range(300):
        rows = np.nonzero(batch.active)
        taken.append([array[rows].copy() for array in batch.views])
        rule.decide(batch.views, batch.active, batch.dice, actions)
        batch.step(actions)
    return Views(*(np.concatenate(column) for column in zip(*taken, strict=True)))


def in_torch(actor: Actor, views: Views) -> list[np.ndarray]:
    with torch.no_grad():
        return [each.numpy() for each in actor(*(torch.from_numpy(a) for a in views))]


def test_numpy_and_torch_agree(actor, seen):
    assert len(seen.nodes) > 1000
    for ours, theirs in zip(forward(weights_of(actor), *seen), in_torch(actor, seen), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


def test_the_order_of_candidates_does_not_matter(actor, seen):
    order = np.random.default_rng(1).permutation(8)
    shuffled = Views(
        seen.nodes[:, np.r_[0, 1 + order]], seen.request, seen.me, seen.routes[:, np.r_[0, 1, FIRST_CANDIDATE + order]]
    )
    route, admit, price = in_torch(actor, seen)
    route_2, admit_2, price_2 = in_torch(actor, shuffled)
    np.testing.assert_allclose(route_2[:, np.r_[0, 1]], route[:, np.r_[0, 1]], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(route_2[:, FIRST_CANDIDATE:], route[:, FIRST_CANDIDATE + order], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(admit_2, admit, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(price_2, price, rtol=1e-4, atol=1e-4)


def test_masked_routes_are_never_chosen(actor, seen):
    policy = LearnedPolicy(weights_of(actor), {})
    actions = make_actions(len(seen.nodes))
    policy.decide(seen, np.ones(len(seen.nodes), np.bool_), np.zeros((len(seen.nodes), 4)), actions)
    assert (seen.routes[np.arange(len(seen.nodes)), actions.route] == 1).all()
    assert (actions.route != HOLD).any()


def test_an_untrained_actor_trusts_the_estimate_and_the_record(seen):
    policy = LearnedPolicy(weights_of(Actor()), {})
    rows = seen.routes[:, LOCAL] == 1
    views = Views(*(a[rows] for a in seen))
    actions = make_actions(len(views.nodes))
    policy.decide(views, np.ones(len(views.nodes), np.bool_), np.zeros((len(views.nodes), 4)), actions)
    trust = np.exp(views.nodes[..., PACE].clip(0) + views.nodes[..., RECORD].clip(0))
    expected_s = views.nodes[..., FINISH_S] * trust + views.nodes[..., OVERDUE]
    finish_s = np.where(views.routes[:, LOCAL:] == 1, expected_s, np.inf)
    chosen_s = finish_s[np.arange(len(finish_s)), actions.route - LOCAL]
    assert (chosen_s <= 1.1 * finish_s.min(1)).mean() > 0.97


def test_inactive_providers_keep_their_actions(actor, seen):
    actions = make_actions(len(seen.nodes))
    actions.route[:] = 7
    active = np.arange(len(seen.nodes)) % 3 == 0
    LearnedPolicy(weights_of(actor), {}).decide(seen, active, np.zeros((len(active), 4)), actions)
    assert (actions.route[~active] == 7).all()


def test_a_bundle_decides_as_the_actor_it_came_from(actor, seen, tmp_path):
    save(actor, tmp_path / "policy", {"name": "mine", "training": {"seed": 3}})
    policy = load(tmp_path / "policy")
    assert policy.name == "mine" and policy.manifest["training"] == {"seed": 3}
    for ours, theirs in zip(forward(policy.weights, *seen), forward(weights_of(actor), *seen), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_saving_again_replaces_the_bundle_and_leaves_nothing_else(actor, tmp_path):
    save(actor, tmp_path / "policy", {"name": "one"})
    save(actor, tmp_path / "policy", {"name": "two"})
    assert load(tmp_path / "policy").name == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_saving_over_a_folder_that_is_no_bundle_is_refused(actor, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a policy bundle"):
        save(actor, tmp_path / "photos")
    assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"x"


def test_a_policy_that_cannot_be_loaded_is_not_saved(tmp_path):
    broken = Actor(width=16)
    with torch.no_grad():
        broken.score.weight[0, 0] = float("nan")
    with pytest.raises(BundleError, match=r"score\.weight"):
        save(broken, tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def edit(folder, **changes):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))


def rewrite(folder, change):
    weights = {k: v.copy() for k, v in load(folder).weights.items()}
    change(weights)
    content = safetensors_bytes(weights)
    (folder / WEIGHTS).write_bytes(content)
    edit(folder, sha256={WEIGHTS: digest(content)})


def flip(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def grow(folder):
    with open(folder / WEIGHTS, "r+b") as file:
        file.truncate(17 * 2**20)


def garble(folder):
    (folder / WEIGHTS).write_bytes(b"garbage")
    edit(folder, sha256={WEIGHTS: digest(b"garbage")})


DAMAGE = {
    "another format": (lambda f: edit(f, format=99), "format is 99"),
    "another view version": (lambda f: edit(f, view_version=0), "view_version is 0"),
    "other features": (lambda f: edit(f, features={}), "features differ"),
    "an impossible width": (lambda f: edit(f, width=-1), "width is -1"),
    "another width": (lambda f: edit(f, width=8), r"node_in\.weight|about_in\.weight"),
    "a digest that is no mapping": (lambda f: edit(f, sha256=3), "SHA-256"),
    "a changed byte": (flip, "SHA-256"),
    "a file too large": (grow, "at most"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "cannot be read"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "cannot be read"),
    "a manifest that is not JSON": (lambda f: (f / MANIFEST).write_text("{"), "not JSON"),
    "a manifest that is no object": (lambda f: (f / MANIFEST).write_text("[]"), "JSON object"),
    "a manifest that is not text": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "not JSON"),
    "weights that are not safetensors": (garble, "not a safetensors file"),
    "a missing matrix": (lambda f: rewrite(f, lambda w: w.pop("hold.weight")), r"hold\.weight is missing"),
    "a matrix of another shape": (lambda f: rewrite(f, lambda w: w.update({"hold.bias": np.zeros(2, "f4")})), "hold"),
    "a matrix of doubles": (lambda f: rewrite(f, lambda w: w.update({"hold.bias": np.zeros(1)})), "float64"),
    "a NaN": (lambda f: rewrite(f, lambda w: w["hold.bias"].fill(np.nan)), "finite"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bundle_is_refused_with_the_reason(damage, actor, tmp_path):
    harm, reason = DAMAGE[damage]
    save(actor, tmp_path / "policy")
    harm(tmp_path / "policy")
    with pytest.raises(BundleError, match=reason) as refusal:
        load(tmp_path / "policy")
    assert str(tmp_path) in str(refusal.value)
