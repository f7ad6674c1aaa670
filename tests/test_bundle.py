"""The learned policy: its network, its bundle, and the same decisions by kernels, torch and ONNX."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from bundle_cases import RESULTS, WITHOUT
from safetensors.numpy import load as read_safetensors
from safetensors.numpy import save as safetensors_bytes

from wwwserve.agents.decision import FIRST_CANDIDATE, HOLD, IF_IT_PAYS, KEEP, LOCAL, ROUTES, WHAT_PAYS, make_actions
from wwwserve.agents.policy.bundle import (
    CARD,
    MANIFEST,
    ONNX,
    SEALED,
    SHIPPED,
    WEIGHTS,
    BundleError,
    folder_of,
    load,
    read,
    results_table,
    save,
    seal,
)
from wwwserve.agents.policy.forward import LearnedPolicy
from wwwserve.agents.policy.network import Actor, actor_of, onnx_bytes, weights_of
from wwwserve.agents.rules import Rule
from wwwserve.agents.tariff import MARKUPS
from wwwserve.agents.view import FINISH_S, LOAD_S, OVERDUE, PACE, RECORD, SLOWDOWN_S, VIEW_VERSION, Views
from wwwserve.eval.policies import PolicyError, load_policy
from wwwserve.train.export import card, export, record

ROOT = Path(__file__).resolve().parent.parent


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
def seen(actor) -> Views:
    """Views from markets in play, of providers with a request to decide on and without."""
    return record(LearnedPolicy(weights_of(actor), {}), 10_000, seed=5)


@pytest.fixture(scope="module")
def few(seen) -> Views:
    """Four of them."""
    return Views(*(array[2498:2502] for array in seen))


@pytest.fixture(scope="module")
def bundle(actor, tmp_path_factory) -> Path:
    """A bundle, not to be changed."""
    folder = tmp_path_factory.mktemp("made") / "policy"
    about = {"training": {"seed": 7, "kinds": ["honest"], "duration_s": 60.0, "out": "/home/me"}, "agent_steps": 12}
    export(weights_of(actor), folder, about, RESULTS)
    return folder


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "policy"))


def keep(policy: Actor, folder: Path, about: dict[str, str], views: Views) -> None:
    save(weights_of(policy), folder, about, views, onnx_bytes(policy, views), card)


def in_torch(actor: Actor, views: Views) -> list[np.ndarray]:
    with torch.no_grad():
        return [each.numpy() for each in actor(actor.inputs(*(torch.from_numpy(a) for a in views)))]


def heads(logits: np.ndarray) -> list[np.ndarray]:
    return np.split(logits, [ROUTES], axis=1)


def test_kernels_torch_and_onnx_agree_on_ten_thousand_views(actor, bundle, seen):
    assert len(seen.nodes) == 10_000
    session = onnxruntime.InferenceSession(bundle / ONNX, providers=["CPUExecutionProvider"])
    ours = heads(load(bundle).logits(seen))
    torchs, onnxs = in_torch(actor, seen), session.run(["route", "markup"], seen._asdict())
    for theirs in (torchs, onnxs):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
            second, first = np.sort(a, axis=1)[:, -2:].T
            differ = a.argmax(1) != b.argmax(1)
            assert (first - second)[differ].max(initial=0) < 2e-4


def test_views_are_recorded_with_a_request_and_without(seen):
    assert (seen.me[:, 0] > 0.5).sum() == 7_500
    assert len(np.unique(seen.nodes[:, 0], axis=0)) > 5_000


def test_the_order_of_candidates_does_not_matter(actor, seen):
    order = np.random.default_rng(1).permutation(8)
    shuffled = Views(
        seen.nodes[:, np.r_[0, 1 + order]], seen.request, seen.me, seen.routes[:, np.r_[0, 1, FIRST_CANDIDATE + order]]
    )
    policy = LearnedPolicy(weights_of(actor), {})
    (route, *rest), (route_2, *rest_2) = heads(policy.logits(seen)), heads(policy.logits(shuffled))
    np.testing.assert_allclose(route_2[:, np.r_[0, 1]], route[:, np.r_[0, 1]], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(route_2[:, FIRST_CANDIDATE:], route[:, FIRST_CANDIDATE + order], rtol=1e-4, atol=1e-4)
    for a, b in zip(rest, rest_2, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


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
    others_s = 0.5 * views.nodes[..., SLOWDOWN_S] + 10 * views.nodes[..., LOAD_S]
    expected_s = views.nodes[..., FINISH_S] * trust + 0.5 * views.nodes[..., OVERDUE] + others_s
    finish_s = np.where(views.routes[:, LOCAL:] == 1, expected_s, np.inf)
    chosen_s = finish_s[np.arange(len(finish_s)), actions.route - LOCAL]
    assert (chosen_s <= 1.2 * finish_s.min(1)).mean() > 0.95


def test_inactive_providers_keep_their_actions(actor, seen):
    actions = make_actions(len(seen.nodes))
    actions.route[:] = 7
    active = np.arange(len(seen.nodes)) % 3 == 0
    LearnedPolicy(weights_of(actor), {}).decide(seen, active, np.zeros((len(active), 4)), actions)
    assert (actions.route[~active] == 7).all()
    assert (actions.route[active] != 7).any()


def test_what_is_enough_for_the_work_of_others_and_how_dear_it_is_are_the_policys(few, tmp_path):
    made = Actor(width=8, pays=0.25, keep=0.5)
    export(weights_of(made), tmp_path / "policy", {"training": {}, "agent_steps": 0})
    actions = make_actions(len(few.nodes))
    load(tmp_path / "policy").decide(few, np.ones(len(few.nodes), np.bool_), np.zeros((len(few.nodes), 4)), actions)
    assert (actions.admission[:, IF_IT_PAYS] == 0.25).all() and (actions.admission[:, KEEP] == 0.5).all()
    assert (actions.admission[:, :IF_IT_PAYS] == WHAT_PAYS[:IF_IT_PAYS]).all()


def test_a_bundle_that_does_not_say_what_is_enough_asks_for_all_that_it_costs(copy):
    rewrite(copy, lambda w: [w.pop(name) for name in ("pays", "keep")])
    assert load(copy).weights["pays"] == 1.0 and load(copy).weights["keep"] == 0.0


# What is in a bundle.


def test_a_bundle_decides_as_the_actor_it_came_from(actor, bundle, seen):
    policy = load(bundle)
    np.testing.assert_array_equal(policy.logits(seen), LearnedPolicy(weights_of(actor), {}).logits(seen))
    for name, weight in weights_of(actor_of(policy.weights)).items():
        np.testing.assert_array_equal(weight, weights_of(actor)[name])


def test_a_bundle_is_small_and_complete(bundle):
    assert sorted(path.name for path in bundle.iterdir()) == sorted((MANIFEST, *SEALED))
    assert sum(path.stat().st_size for path in bundle.iterdir()) < 200_000


def test_the_manifest_says_what_was_made_of_what(bundle):
    manifest = load(bundle).manifest
    assert manifest["name"] == "learned" and manifest["agent_steps"] == 12 and manifest["seed"] == 7
    assert manifest["environment"]["kinds"] == ["honest"] and manifest["environment"]["duration_s"] == 60.0
    assert manifest["features"]["node"][1] == {"name": "finish_s", "unit": "s", "low": 0, "high": 1e4, "scale": "log"}
    assert manifest["normaliser"]["node"]["log_unit"][:2] == [0.0, 1.0]
    assert manifest["normaliser"]["node"]["full_scale"][1] == pytest.approx(np.log1p(1e4))
    assert manifest["decisions"]["markups"] == [-0.1, 0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8]
    learned = [weight.size for name, weight in load(bundle).weights.items() if name not in ("pays", "keep")]
    assert manifest["architecture"]["parameters"] == sum(learned)
    assert set(manifest["packages"]) == {"python", "numpy", "torch", "numba", "wwwserve"}
    assert manifest["git"] is None or re.fullmatch("[0-9a-f]{40}", manifest["git"]["revision"])
    assert manifest["results"]["policies"]["learned"]["regret"]["random/honest"] == [0.03, None]
    assert len(manifest["golden"]["logits"]) == 16
    assert "/home/me" not in (bundle / MANIFEST).read_text()


def test_golden_views_are_recorded_in_full_precision(bundle, actor):
    found = read(bundle)
    np.testing.assert_array_equal(found.logits, LearnedPolicy(weights_of(actor), {}).logits(found.views))
    assert (found.views.nodes[:, 1:] != 0).any() and (found.views.routes[:, FIRST_CANDIDATE:] == 1).any()


def test_the_card_has_the_results_beside_the_rules(bundle):
    card = (bundle / CARD).read_text()
    assert "| paper/a | 0.9100 ± 0.0100 | 0.8500 ± 0.0100 | 0.8600 ± 0.0100 single | +0.0500 ± 0.0040 |" in card
    assert "| random/honest | 0.8000 ± 0.0200 | 0.8300 ± 0.0200 | 0.8300 ± 0.0200 www_serve | -0.0300 |" in card
    assert "12 agent steps, seed 7" in card and "Limits" in card


def test_the_onnx_model_takes_one_view_or_many_and_names_no_folder_of_its_maker(bundle, few):
    session = onnxruntime.InferenceSession(bundle / ONNX, providers=["CPUExecutionProvider"])
    (route, *_) = session.run(None, {name: array[:1] for name, array in few._asdict().items()})
    assert route.shape == (1, ROUTES)
    assert str(ROOT).encode() not in (bundle / ONNX).read_bytes()


def test_saving_again_replaces_the_bundle_and_leaves_nothing_else(actor, few, tmp_path):
    keep(actor, tmp_path / "policy", {"name": "one"}, few)
    keep(actor, tmp_path / "policy", {"name": "two"}, few)
    assert load(tmp_path / "policy").name == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_the_same_policy_gives_the_same_bytes(actor, few, tmp_path):
    for name in ("a", "b"):
        keep(actor, tmp_path / name, {}, few)
    for name in (MANIFEST, *SEALED):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_saving_over_a_folder_that_is_no_bundle_is_refused(actor, few, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a policy bundle"):
        keep(actor, tmp_path / "photos", {}, few)
    assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"x"


def test_a_policy_that_cannot_be_loaded_is_not_saved(few, tmp_path):
    broken = weights_of(Actor(width=16))
    broken["score.weight"][0, 0] = np.inf
    with pytest.raises(ValueError):
        save(broken, tmp_path / "policy", {}, few, b"", card)
    assert not list(tmp_path.iterdir())


# What is refused.


def edit(folder, **changes):
    """Change the manifest, and make its digests right again."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    contents = {name: (folder / name).read_bytes() for name in SEALED}
    (folder / MANIFEST).write_bytes(seal({k: v for k, v in manifest.items() if v != "gone"}, contents))


def amend(folder, table, change):
    """Change one table of the manifest in place."""
    value = json.loads((folder / MANIFEST).read_text())[table]
    change(value)
    edit(folder, **{table: value})


def rewrite(folder, change):
    weights = {k: v.copy() for k, v in read_safetensors((folder / WEIGHTS).read_bytes()).items()}
    change(weights)
    garble(folder, safetensors_bytes(weights))


def garble(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    edit(folder)


def flip(folder, name, at):
    content = bytearray((folder / name).read_bytes())
    content[at] ^= 1
    (folder / name).write_bytes(content)


def grow(folder, name):
    with open(folder / name, "r+b") as file:
        file.truncate(17 * 2**20)


def lead_away(folder):
    shutil.move(folder / WEIGHTS, folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


def loop(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / WEIGHTS)


def pipe(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def nest(folder, depth):
    (folder / MANIFEST).write_text('{"format": 3, "view_version": 2, "a": ' + "[" * depth + "]" * depth + "}")


def text(folder, content):
    (folder / MANIFEST).write_bytes(content)


DAMAGE = {
    **{f"a changed byte in {name}": (lambda f, n=name: flip(f, n, 500), f"{name}: its SHA-256") for name in SEALED},
    "a changed digit of the seed": (lambda f: text(f, (f / MANIFEST).read_bytes().replace(b'"seed": 7', b'"seed": 8')),
                                    "manifest.json: its SHA-256"),
    "a changed byte at the end of the manifest": (lambda f: flip(f, MANIFEST, -1), "manifest.json: "),
    **{f"no {name}": (lambda f, n=name: (f / n).unlink(), f"{name}: cannot be read: No such file")
       for name in (MANIFEST, *SEALED)},
    **{f"too large a {name}": (lambda f, n=name: grow(f, n), f"{name}: 17825792 bytes, expected at most")
       for name in (MANIFEST, *SEALED)},
    "another format": (lambda f: edit(f, format=99), "format is 99, expected 5"),
    "no format": (lambda f: edit(f, format="gone"), "format is None"),
    "another view version": (lambda f: edit(f, view_version=1), f"view_version is 1, expected {VIEW_VERSION}"),
    "no features": (lambda f: edit(f, features={}), "features differ .* at the top: another form"),
    "a feature in another unit": (lambda f: amend(f, "features", lambda t: t["node"][1].update(unit="ms")),
                                  r"features differ .* at node\[1\]\.unit: 'ms', expected 's'"),
    "other markups": (lambda f: amend(f, "decisions", lambda t: t.update(markups=[1])), "at markups"),
    "another normaliser": (lambda f: amend(f, "normaliser", lambda t: t["self"].update(full_scale=[1.0] * 10)),
                           r"normaliser differs .* at self\.full_scale"),
    "no normaliser": (lambda f: edit(f, normaliser=None), r"normaliser differs .* at node\.log_unit"),
    "an impossible width": (lambda f: edit(f, architecture={"width": -1}), "width is -1, expected an integer from 1"),
    "too great a width": (lambda f: edit(f, architecture={"width": 10**9}), "width is 1000000000"),
    "a width that is no number": (lambda f: edit(f, architecture={"width": True}), "width is True"),
    "no architecture": (lambda f: edit(f, architecture="gone"), "architecture is None"),
    "another architecture": (lambda f: amend(f, "architecture", lambda t: t.update(name="mlp")), r"\.name is 'mlp'"),
    "another count of parameters": (lambda f: amend(f, "architecture", lambda t: t.update(parameters=1)), "is 1, exp"),
    "digests that are no mapping": (lambda f: text(f, re.sub(rb'"sha256": {.*}', b'"sha256": 3',
                                                             (f / MANIFEST).read_bytes())), "does not name exactly"),
    "a link out of the bundle": (lead_away, r"policy\.safetensors: a link that leads out of the bundle"),
    "a link to itself": (loop, r"policy\.safetensors: cannot be read"),
    "a pipe": (pipe, r"policy\.safetensors: not a regular file"),
    "a manifest that is not JSON": (lambda f: text(f, b"{"), "not JSON"),
    "a manifest that is no object": (lambda f: text(f, b"[]"), "JSON object"),
    "a manifest that is not text": (lambda f: text(f, b"\xff\xfe"), "not JSON"),
    "a manifest with NaN": (lambda f: text(f, b'{"format": NaN}'), "NaN is no JSON number"),
    "a manifest with a number of 5000 digits": (lambda f: text(f, b"[" + b"9" * 5000 + b"]"), "not JSON"),
    "a manifest nested too deeply": (lambda f: nest(f, 100), "nested too deeply"),
    "a manifest nested beyond reading": (lambda f: nest(f, 100_000), "nested too deeply"),
    "weights that are not safetensors": (lambda f: garble(f, b"garbage"), "not a safetensors file"),
    "a missing matrix": (lambda f: rewrite(f, lambda w: w.pop("hold.weight")), r"hold\.weight is missing"),
    "a matrix too many": (lambda f: rewrite(f, lambda w: w.update(x=np.zeros(1, "f4"))), "'x' is no weight"),
    "a matrix of another shape": (lambda f: rewrite(f, lambda w: w.update({"hold.bias": np.zeros(2, "f4")})),
                                  r"hold\.bias is float32\[2\], expected float32\[1\]"),
    "a matrix of doubles": (lambda f: rewrite(f, lambda w: w.update({"hold.bias": np.zeros(1)})), "is float64"),
    "a NaN": (lambda f: rewrite(f, lambda w: w["hold.bias"].fill(np.nan)), r"hold\.bias has numbers .* not finite"),
    "a share below nothing": (lambda f: rewrite(f, lambda w: w["pays"].fill(-0.5)), r"pays is -0\.5, expected 0 to 2"),
    "a price that is too dear": (lambda f: rewrite(f, lambda w: w["keep"].fill(5)), "keep is 5, expected 0 to 4"),
    "other weights": (lambda f: rewrite(f, lambda w: w["markup.bias"].__iadd__(0.01)), "golden view differ by 0.01"),
    "another golden logit": (lambda f: amend(f, "golden", lambda t: t["logits"][3].__setitem__(-1, 5e9)),
                             "differ by 5e.09 from those computed here, expected at most 0.0001"),
    "another golden view": (lambda f: amend(f, "golden", lambda t: t["me"][3].__setitem__(0, 0.4)),
        "golden view differ"),
    "no golden views": (lambda f: edit(f, golden="gone"), "golden does not hold exactly"),
    "golden views of another shape": (lambda f: amend(f, "golden", lambda t: t["me"].pop()), "golden me is not"),
    "golden views that are no numbers": (lambda f: amend(f, "golden", lambda t: t.update(me=[None])),
        "golden me is not"),
    "golden views that are no list": (lambda f: amend(f, "golden", lambda t: t.update(nodes=3)), "golden nodes is not"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bundle_is_refused_with_file_and_reason(damage, copy):
    harm, reason = DAMAGE[damage]
    harm(copy)
    with pytest.raises(BundleError, match=reason) as refusal:
        load(copy)
    assert str(refusal.value).startswith(str(copy))


def test_a_link_to_the_bundle_itself_is_followed(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle)
    assert load(tmp_path / "link").name == "learned"


def test_learned_is_the_policy_that_is_shipped(copy, monkeypatch):
    monkeypatch.setattr("wwwserve.agents.policy.bundle.DEFAULT_BUNDLE", copy)
    assert load_policy("learned").name == "learned"
    (copy / ONNX).unlink()
    with pytest.raises(PolicyError, match=r"policy 'learned': .*policy\.onnx: cannot be read"):
        load_policy("learned")


def test_it_runs_where_no_training_library_can_be_imported(bundle):
    program = WITHOUT + "from wwwserve.agents.policy.bundle import load\nprint(load(sys.argv[1]).name)"
    command = [sys.executable, "-c", program, str(bundle)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "learned\n", done.stderr


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_policy_that_is_shipped_goes_by_its_name(name):
    assert load_policy(name).name == name
    assert folder_of(name) == SHIPPED[name] and folder_of("elsewhere") == Path("elsewhere")
    assert folder_of(None) == SHIPPED["competitive"]


def test_the_team_that_ships_sells_as_the_best_rule_does():
    weights, best = load(SHIPPED["cooperative"]).weights, Rule("best_value").settings
    assert (weights["pays"], weights["keep"]) == (best["pays"], best["keep"])
    policy = load_policy("cooperative")
    posted = policy.logits(record(policy, 256, 8))[:, ROUTES:].argmax(1)
    assert (MARKUPS[posted] == best["markup"]).all()


def test_the_team_that_ships_has_its_results_on_its_card():
    rows = results_table(load(SHIPPED["cooperative"]).manifest)
    assert len(rows) == 23 and rows[1][0] == "paper/alternating"
