"""What the tests of bundles and of the command share."""

# Results as `eval.regret.judge` gives them.
RESULTS = {
    "best_rule": {"paper/a": "single", "random/honest": "www_serve"},
    "policies": {
        "learned": {
            "score": {"paper/a": [0.91, 0.01], "random/honest": [0.8, 0.02]},
            "regret": {"paper/a": [-0.05, 0.004], "random/honest": [0.03, float("nan")]},
        },
        "www_serve": {"score": {"paper/a": [0.85, 0.01], "random/honest": [0.83, 0.02]}},
        "single": {"score": {"paper/a": [0.86, 0.01], "random/honest": [0.7, 0.02]}},
    },
}

# A program that begins so cannot import what is for learning.
WITHOUT = """
import sys

BLOCKED = {"torch", "pettingzoo", "gymnasium", "stable_baselines3", "onnx", "onnxruntime", "matplotlib"}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
"""
