"""One HTML page about one or more runs, from what their folders hold.

run_data.py reads a folder; page_data.py makes it small enough for a page; panels.py says which curves there are; page.py puts
the data and assets/ (markup, style, scripts) into one file, which needs no network and no other file.
"""
