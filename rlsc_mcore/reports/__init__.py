"""Render a report of one or more runs as a self-contained HTML page or a static figure."""
