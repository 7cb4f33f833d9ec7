"""The page that a finished run shows: `python -m tools.report --workdir=DIR` writes report.html and report.json."""
