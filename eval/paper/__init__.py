"""The experiments of WWW.Serve (arXiv 2603.20661), run in the simulated market: `python -m eval.paper [FIGURE...]`."""
