"""Reports: a page for each run, a comparison of runs, and an index of all runs, as HTML that needs nothing else.

A run also has a model card, which is a part of its report as Markdown.

`gather` reads what a run has written, `sections` turns it into texts, tables and charts, `pages` renders them with the
templates in `templates/`, and `publish` writes the page into the folder of the run.
"""
