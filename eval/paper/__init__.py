"""The experiments of WWW.Serve (arXiv 2603.20661), run in the simulated market: `wwwserve paper [FIGURE...]`."""
